"""Stands in for dist-llm where a test is about slurm/train.sbatch and not about training.

``config show`` prints a config with the run directory; ``train CONFIG [key=value ...]`` does what the keys say:
``run_dir``, ``exit`` (the code a rank ends with), ``rank1_exit`` (that of rank 1), ``first_cause`` (a code that rank 0
writes to exit.json), ``wait=1`` (wait for a signal first; at the second start do not), ``slow_s`` (seconds a rank takes to save).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from dist_llm.cluster.exit_file import next_attempt, write_exit
from dist_llm.cluster.slurm import rank_environment


def main(argv: list[str]) -> int:
    options = dict(word.partition("=")[::2] for word in argv if "=" in word)
    if argv[:2] == ["config", "show"]:
        print(f'name: stand-in\nrun_dir: "{options["run_dir"]}"  # command line\nmodel:\n  run_dir: not this one')
        return 0
    place = rank_environment(os.environ)
    assert argv[0] == "train" and place is not None
    stopped: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda n, frame: stopped.append(n))
    fields = {
        "rank": place.rank,
        "of": place.world_size,
        "node": os.environ["SLURMD_NODENAME"],
        "start": place.restart_count + 1,
        "threads": os.environ["OMP_NUM_THREADS"],
        "argv": argv[1:],
    }
    print("up " + json.dumps(fields), file=sys.stderr, flush=True)
    code = int(options.get("exit", "0"))
    if options.get("wait") and place.restart_count == 0:
        deadline = time.monotonic() + 60
        while not stopped and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(float(options.get("slow_s", "0")))
        print(f"rank {place.rank} got {[signal.Signals(n).name for n in stopped]}", file=sys.stderr, flush=True)
        code = 75 if stopped else 72
    if place.rank == 0 and "first_cause" in options:
        run_dir = Path(options["run_dir"])
        write_exit(run_dir, code=int(options["first_cause"]), reason="told to", host=socket.gethostname(), attempt=next_attempt(run_dir))
    if place.rank == 1 and "rank1_exit" in options:
        code = int(options["rank1_exit"])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
