"""Time a rank spends inside blocking collectives, whoever calls them.

DeepSpeed calls ``torch.distributed`` by itself, so the only place where all communication of a step passes is that module:
while a ``CommClock`` runs, its collectives are wrapped. Calls with ``async_op=True`` count only the time to start them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

__all__ = ["CommClock"]

_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all",
    "all_to_all_single",
    "barrier",
)


class CommClock:
    """Context manager; ``take()`` gives the seconds since it was last asked.

    Nested calls (a collective that is built from another one) count once.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._depth = 0
        self._originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> CommClock:
        for name in _COLLECTIVES:
            original = getattr(dist, name, None)
            if original is None:  # a build of torch without distributed has none of them
                continue
            self._originals[name] = original
            setattr(dist, name, self._timed(original))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)
        self._originals.clear()

    def take(self) -> float:
        """Seconds in collectives since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._seconds += time.perf_counter() - start

        return timed
