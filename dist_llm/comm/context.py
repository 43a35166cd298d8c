"""Groups of ranks as frozen values.

Built once in ``engine/launch.py`` and passed down; layers receive a ``Group``, never the world.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.distributed import ProcessGroup

__all__ = ["SINGLE", "Group", "ParallelContext"]


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, seen from one of them.

    ``handle`` is None for a group of one that needs no process group at all.
    """

    rank: int
    size: int
    handle: ProcessGroup | None = field(default=None, compare=False, repr=False)


SINGLE = Group(rank=0, size=1)


@dataclass(frozen=True)
class ParallelContext:
    """Everything a part may want to know about where it runs."""

    device: torch.device
    world: Group = SINGLE
    dp: Group = SINGLE
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and speaks for the run."""
        return self.world.rank == 0
