"""Started by a launcher: `dist-llm train`, with a fault planted in one rank at one step. The product has no hook for it.

usage: fault_program.py [--local_rank=R] FAULT RANK STEP train CONFIG [a.b=c ...]

    raise   that rank raises in the step
    refuse  that rank raises an error for a person in the step
    hang    that rank sleeps in the step, alive and not stopped; collectives time out after TIMEOUT_S
    two-machines    nothing happens, but every two ranks take themselves to be on a machine of their own, and the first machine is
                    slow to write down who failed
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from datetime import timedelta
from typing import Any

from dist_llm.cli.main import entry
from dist_llm.cluster.health import Failure, HealthDir
from dist_llm.utils.errors import DataError

TIMEOUT_S = 8
SLOW_S = 2  # longer than a broken connection takes to be noticed, shorter than a rank waits for its cause


def plant(fault: str, rank: int, step: int) -> None:
    """Wrap the training step of this process."""
    from dist_llm.engine import launch, loop, watch

    if fault == "two-machines":
        name = f"n{int(os.environ['RANK']) // 2 + 1}"
        there = dataclasses.replace(watch.this_process(), host=name, machine=name)
        watch.this_process = lambda: there
        claim = watch.HealthDir.claim

        def slow_claim(self: HealthDir, failure: Failure) -> Failure:
            time.sleep(SLOW_S if name == "n1" else 0)
            return claim(self, failure)

        watch.HealthDir.claim = slow_claim
    if fault == "hang":
        launch.COLLECTIVE_TIMEOUT = timedelta(seconds=TIMEOUT_S)
    original = loop.train_step
    calls = 0

    def faulty_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step and int(os.environ["RANK"]) == rank:
            if fault == "raise":
                raise KeyError("planted")
            if fault == "refuse":
                raise DataError("shard planted-0007.tar is damaged")
            sleep_for_ever()
        return original(*args, **kwargs)

    loop.train_step = faulty_step


def sleep_for_ever() -> None:
    """What a rank does that others wait for."""
    while True:
        time.sleep(1)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    plant(words[0], int(words[1]), int(words[2]))
    sys.argv[1:] = words[3:]
    entry()
