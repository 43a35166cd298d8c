"""Life on a cluster: who owns a run directory, how an attempt ended, SLURM. Never torch."""
