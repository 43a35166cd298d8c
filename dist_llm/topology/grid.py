"""Ranks as coordinates on named axes.

The world is a box with one axis a kind of parallelism; a rank is a mixed-radix number whose digits are its coordinates.
The first axis of the order varies fastest, so its groups are neighbouring ranks: tensor parallelism, which talks most,
stays inside a node (Narayanan et al., arXiv:2104.04473, section 3).

Every question about one rank costs its answer, never a list of the world.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["AXES", "RankGrid"]

# Fastest-varying first.
AXES = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True)
class RankGrid:
    """``sizes`` of the axes and the ``order`` in which they vary, fastest first; an axis without a size has size 1."""

    sizes: Mapping[str, int]
    order: tuple[str, ...] = AXES

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for an axis named twice, a size without a place in the order, or a size below 1."""
        order = tuple(self.order)
        if len(set(order)) != len(order):
            raise ValueError(f"the order of axes names one twice: {', '.join(order)}")
        for axis, size in self.sizes.items():
            if axis not in order:
                raise ValueError(f"axis {axis} (size {size}) has no place in the order of axes ({', '.join(order)})")
            if size < 1:
                raise ValueError(f"axis {axis} has size {size}; an axis has at least 1 rank")
        object.__setattr__(self, "order", order)
        # Copied, complete and in order: two grids that mean the same are equal, and the caller's mapping may change.
        object.__setattr__(self, "sizes", {axis: self.sizes.get(axis, 1) for axis in order})

    def __hash__(self) -> int:
        return hash((self.order, tuple(self.sizes.values())))

    @property
    def size(self) -> int:
        """Ranks in the grid."""
        return math.prod(self.sizes.values())

    def group_size(self, axes: str | Iterable[str]) -> int:
        """Ranks in one group along ``axes``."""
        return math.prod(self.sizes[axis] for axis in self._known(axes))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of ``rank`` on each axis, in the order of the axes; ``ValueError`` outside the grid."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is outside the grid of {self.size} ranks ({self})")
        position = {}
        for axis, size in self.sizes.items():
            rank, position[axis] = divmod(rank, size)
        return position

    def rank_of(self, coordinates: Mapping[str, int]) -> int:
        """The rank at ``coordinates``; an axis that is not named is at 0. ``ValueError`` outside the grid."""
        self._known(coordinates)
        rank, stride = 0, 1
        for axis, size in self.sizes.items():
            position = coordinates.get(axis, 0)
            if not 0 <= position < size:
                raise ValueError(f"position {position} is outside axis {axis} of size {size}")
            rank += position * stride
            stride *= size
        return rank

    def group_of(self, rank: int, axes: str | Iterable[str]) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` only along ``axes``, ascending: the grid's order, however ``axes`` is ordered."""
        axes = self._known(axes)
        base = rank - sum(self._stride(axis) * position for axis, position in self.coordinates(rank).items() if axis in axes)
        return tuple(base + offset for offset in self._offsets(axes))

    def groups(self, axes: str | Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Every group along ``axes``, by first rank: together they hold each rank once."""
        axes = self._known(axes)
        within = self._offsets(axes)
        starts = self._offsets(frozenset(self.order) - axes)
        return tuple(tuple(start + offset for offset in within) for start in starts)

    def _known(self, axes: str | Iterable[str]) -> frozenset[str]:
        chosen = frozenset((axes,) if isinstance(axes, str) else axes)
        if unknown := sorted(chosen.difference(self.order)):
            raise ValueError(f"no axis {unknown[0]} in this grid; its axes are {', '.join(self.order)}")
        return chosen

    def _stride(self, axis: str) -> int:
        return math.prod(self.sizes[faster] for faster in self.order[: self.order.index(axis)])

    def _offsets(self, axes: frozenset[str]) -> list[int]:
        """Distances from the group's first rank, ascending because slower axes are the outer loop and have the longer stride."""
        offsets = [0]
        for axis in self.order:
            if axis in axes:
                stride = self._stride(axis)
                offsets = [step * stride + offset for step in range(self.sizes[axis]) for offset in offsets]
        return offsets

    def __str__(self) -> str:
        return " x ".join(f"{axis} {size}" for axis, size in self.sizes.items())
