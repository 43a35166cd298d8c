"""Layers cut into pipeline stages of nearly equal cost.

The slowest stage sets the pace of a pipeline, so the cut minimises the largest cost. A given largest cost is reachable if
filling the stages from the left, each as far as it goes, gets to the end; the smallest reachable one is found by bisection.
Costs are taken as exact integers over their common denominator: equal layers tie exactly, on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["cut_stages"]


def cut_stages(costs: Sequence[float], num_stages: int, *, first: float = 0.0, last: float = 0.0) -> tuple[range, ...]:
    """The layers of each stage, contiguous, at least one a stage, with the smallest possible largest cost.

    costs: one a layer, any unit; ``first`` and ``last`` are what the first and the last stage carry besides (embedding, head).
    Among equal cuts the last stage has the fewest layers (it also holds the logits), then the one before it, and so on.
    Raises ``ValueError`` for fewer layers than stages and for a cost that is negative or not finite.
    """
    num_layers = len(costs)
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_layers} layers cannot be cut into {num_stages} pipeline stages: a stage has at least one layer")
    *layers, first_extra, last_extra = _integers([*costs, first, last])
    low, high = 0, sum(layers) + first_extra + last_extra  # everything on one stage is enough for any
    cut = _fill(layers, num_stages, first_extra, last_extra, high)
    while low < high:
        middle = (low + high) // 2
        attempt = _fill(layers, num_stages, first_extra, last_extra, middle)
        if attempt is None:
            low = middle + 1
        else:
            high, cut = middle, attempt
    assert cut is not None
    return tuple(cut)


def _fill(layers: Sequence[int], num_stages: int, first: int, last: int, limit: int) -> list[range] | None:
    """Stages from the left, each as long as ``limit`` allows while one layer is left for every stage after it."""
    stages: list[range] = []
    start = 0
    for stage in range(num_stages):
        is_last = stage == num_stages - 1
        end = start
        cost = (first if stage == 0 else 0) + (last if is_last else 0)
        room = len(layers) - (num_stages - 1 - stage)
        while end < room and (end == start or is_last or cost + layers[end] <= limit):
            cost += layers[end]
            end += 1
        if cost > limit:
            return None
        stages.append(range(start, end))
        start = end
    return stages


def _integers(costs: Sequence[float]) -> list[int]:
    """The costs times their common denominator: a power of two for floats, so nothing is rounded."""
    for cost in costs:
        if not (math.isfinite(cost) and cost >= 0):
            raise ValueError(f"a stage's cost must be a number from 0 up, got {cost}")
    ratios = [cost.as_integer_ratio() for cost in costs]
    denominator = math.lcm(*(below for _, below in ratios))
    return [above * (denominator // below) for above, below in ratios]
