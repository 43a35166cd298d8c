from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from slurm_cluster import NODES, SlurmCluster, processes_of, wait_until

KILLED_WHILE_IT_RUNS = """
import os, signal
from slurm_cluster import SlurmCluster
cluster = SlurmCluster()
cluster.start()
cluster.submit("--output=/dev/null", "--wrap=sleep 300")
print(cluster.dir, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_two_nodes_run_one_step_together(slurm: SlurmCluster) -> None:
    where = slurm.command("srun", "--nodes=2", "--ntasks-per-node=1", "printenv", "SLURMD_NODENAME")
    assert sorted(where.split()) == sorted(NODES)


def test_no_process_and_no_file_survives_a_killed_test_run(slurm: SlurmCluster) -> None:
    # `slurm` is asked for so that this test, too, is skipped where there is no Slurm; its own cluster must survive.
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_IT_RUNS], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    directory = Path(done.stdout.strip())
    wait_until(lambda: not processes_of(directory) and not directory.exists(), timeout_s=20, what="the reaper to clean up")
    assert len(processes_of(slurm.dir)) >= 4
