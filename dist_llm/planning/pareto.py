"""What cannot be had better in one way without being worse in another: seconds of a step, bytes of a device, number of devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from dist_llm.planning.search import Plan, Search

__all__ = ["front", "time_against_memory"]

T = TypeVar("T")


def front(items: Iterable[T], costs: Callable[[T], Sequence[float]]) -> list[T]:
    """The items that no other item is at least as good as in every cost and better in one; of equal ones the first, in their order."""
    known = [(item, tuple(costs(item))) for item in items]
    kept = []
    for i, (item, mine) in enumerate(known):
        beaten = any(
            all(a <= b for a, b in zip(other, mine, strict=True)) and (other != mine or j < i)
            for j, (_, other) in enumerate(known)
            if j != i
        )
        if not beaten:
            kept.append(item)
    return kept


def time_against_memory(search: Search, *, step: float = 0.1) -> list[Plan]:
    """From the fastest plan on, the fastest one with less memory, and so on to the smallest: each is on the front.

    step: how much less memory the next one has to need, as a share; 0 gives the whole front.
    """
    plans: list[Plan] = []
    under: float | None = None
    while found := search.best(1, under_bytes=under):
        plans += found
        under = found[0].memory.total * (1 - step)
    return plans
