"""How long pure arithmetic takes, for the few promises that are about time.

A benchmark is not a test; these promises (16,384 ranks in milliseconds) have margins of ten and more, and what is looked at is the best of
several attempts in process CPU time, without the garbage collector walking over whatever else the test process holds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable


def best_cpu_seconds(call: Callable[[], object], attempts: int = 5) -> float:
    """Least CPU seconds of ``attempts`` calls."""
    seconds = []
    was_on = gc.isenabled()
    gc.disable()
    try:
        for _ in range(attempts):
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
    finally:
        if was_on:
            gc.enable()
    return min(seconds)
