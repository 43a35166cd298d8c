"""The first two approaches to the best size for a number of FLOPs: the minimum over training curves, and IsoFLOP parabolas.

Hoffmann et al. (arXiv:2203.15556), sections 3.1 and 3.2. Both give N = k C^a without a formula for the loss. A curve is what one
size reaches with more and more tokens; its points must be ends of runs whose learning rate had come down, or the short ones look worse
than they are (section 3.1 of the paper, and the reason it gives for Kaplan's other exponent).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dist_llm.planning.law_forms import Matrix, Points
from dist_llm.planning.laws import PowerLaw

__all__ = ["Frontier", "envelope", "isoflop", "with_noise"]

_BUDGETS = 1500  # of approach 1, as published
_SLICES = 6  # IsoFLOP budgets taken from curves when no runs were made at equal FLOPs
_SAME_BUDGET = 0.1  # log FLOPs


@dataclass(frozen=True)
class Frontier:
    """Best size against compute.

    flops, params: (m,) the optima found. law: through them. exponent_interval: 2.5 and 97.5 percentiles under noise, or None.
    """

    flops: Matrix
    params: Matrix
    law: PowerLaw
    exponent_interval: tuple[float, float] | None = None


def _curves(points: Points) -> list[tuple[float, Matrix, Matrix]]:
    # (active parameters, log tokens, log loss) of each size with at least two token counts; of equal ones the lower loss.
    found = []
    for size in np.unique(points.active):
        mine = points.take(points.active == size)
        tokens = np.unique(mine.tokens)
        if len(tokens) > 1:
            lowest = np.array([mine.loss[mine.tokens == t].min() for t in tokens])
            found.append((float(size), np.log(tokens), np.log(lowest)))
    return found


def _through(flops: Matrix, params: Matrix) -> PowerLaw:
    exponent, constant = np.polyfit(np.log(flops), np.log(params), 1)
    return PowerLaw(float(np.exp(constant)), float(exponent))


def _at(curves: list[tuple[float, Matrix, Matrix]], flops: Matrix) -> Matrix:
    # (curves, budgets) log loss of each size at each budget, nan where its curve does not reach.
    room = 1e-9
    return np.stack(
        [
            np.interp(
                np.log(flops / (6.0 * size)), np.concatenate([[t[0] - room], t, [t[-1] + room]]), np.pad(y, 1, mode="edge"), np.nan, np.nan
            )
            for size, t, y in curves
        ]
    )


def envelope(points: Points) -> Frontier | str:
    """Approach 1: at each of 1500 budgets the size whose curve is lowest, and a power law through them; or why there is none.

    A budget counts when the winner has a smaller and a larger rival at it: at an edge the best size may lie beyond.
    """
    curves = _curves(points)
    if len(curves) < 3:
        return f"{len(curves)} size(s) have two token counts or more; the minimum over curves needs 3"
    budgets = np.geomspace(points.flops.min(), points.flops.max(), _BUDGETS)
    sizes = np.array([size for size, _, _ in curves])[:, None]
    losses = _at(curves, budgets)
    there = np.isfinite(losses)
    best = sizes[np.where(there, losses, np.inf).argmin(axis=0), 0]
    counts = (there & (sizes < best)).any(axis=0) & (there & (sizes > best)).any(axis=0)
    if len(np.unique(best[counts])) < 2:
        return "the lowest curve is that of the smallest or largest size at nearly every budget: add sizes or token counts around it"
    return Frontier(budgets[counts], best[counts], _through(budgets[counts], best[counts]))


def _vertex(sizes: Matrix, losses: Matrix) -> float | None:
    # Size at the bottom of the parabola through loss against log size, where it has one inside the sizes. Only the lowest size and two
    # on each side: far from its bottom the valley is no parabola, and lopsided.
    order = np.argsort(sizes, kind="stable")
    lowest = int(losses[order].argmin())
    near = order[max(0, lowest - 2) : lowest + 3]
    x = np.log(sizes[near])
    curvature, slope, _ = np.polyfit(x - x.mean(), losses[near], 2)
    bottom = -slope / (2 * curvature) if curvature > 0 else np.inf
    return float(np.exp(x.mean() + bottom)) if x.min() <= x.mean() + bottom <= x.max() else None


def isoflop(points: Points) -> Frontier | str:
    """Approach 2: a parabola of loss against log N at each budget, and a power law through the bottoms; or why there is none.

    Budgets are those at which at least 3 sizes were run (equal within 10 %). Where fewer than half of the runs belong to such, the
    curves of all sizes are cut at 6 budgets, with the loss interpolated.
    """
    groups = _equal_budgets(points)
    if 2 * sum(len(sizes) for _, sizes, _ in groups) < len(points) and (curves := _curves(points)):
        budgets = np.geomspace(points.flops.min(), points.flops.max(), _SLICES + 2)[1:-1]
        sizes = np.array([size for size, _, _ in curves])
        cuts = [(float(c), np.isfinite(column), column) for c, column in zip(budgets, _at(curves, budgets).T, strict=True)]
        groups = [(c, sizes[there], np.exp(column[there])) for c, there, column in cuts if there.sum() > 2]
    bottoms = [(c, size) for c, sizes, losses in groups if (size := _vertex(sizes, losses)) is not None]
    if len(bottoms) < 2:
        return f"{len(bottoms)} of {len(groups)} budgets with 3 sizes or more have a lowest loss between their sizes; 2 are needed"
    flops, params = (np.array(column) for column in zip(*bottoms, strict=True))
    return Frontier(flops, params, _through(flops, params))


def _equal_budgets(points: Points) -> list[tuple[float, Matrix, Matrix]]:
    order = np.argsort(points.flops, kind="stable")
    log_flops = np.log(points.flops[order])
    parts = np.split(order, np.flatnonzero(np.diff(log_flops) > _SAME_BUDGET) + 1)
    # A chain of small gaps is a grid of sizes and tokens, not a budget.
    together = [
        part for part in parts if np.ptp(np.log(points.flops[part])) <= 2 * _SAME_BUDGET and len(np.unique(points.active[part])) > 2
    ]
    return [(float(np.exp(np.log(points.flops[p]).mean())), points.active[p], points.loss[p]) for p in together]


def with_noise(
    approach: Callable[[Points], Frontier | str], points: Points, noise: float, *, samples: int = 100, seed: int = 0
) -> Frontier | str:
    """The approach on the points, and the spread of its exponent when every log loss is moved by normal noise of this size."""
    found = approach(points)
    if isinstance(found, str):
        return found
    rng = np.random.default_rng(seed)
    exponents = []
    for _ in range(samples):
        moved = Points(points.params, points.tokens, points.loss * np.exp(noise * rng.standard_normal(len(points))), points.active)
        again = approach(moved)
        if not isinstance(again, str):
            exponents.append(again.law.exponent)
    if len(exponents) < samples // 2:
        return found
    low, high = np.quantile(exponents, (0.025, 0.975))
    return Frontier(found.flops, found.params, found.law, (float(low), float(high)))
