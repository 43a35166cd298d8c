"""dist_llm: train language models on SLURM clusters, and trust the numbers."""

__all__ = ["__version__"]

__version__ = "0.1.0"
