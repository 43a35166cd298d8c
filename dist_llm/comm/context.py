"""Groups of ranks as frozen values.

Built once at the start (``comm/build.py``) and passed down; layers receive a ``Group``, never the world.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.distributed import ProcessGroup

__all__ = ["SINGLE", "Group", "ParallelContext"]


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, seen from one of them.

    ``handle`` is None for a group of one that needs no process group at all. ``ranks`` are their numbers in the world.
    """

    rank: int
    size: int
    handle: ProcessGroup | None = field(default=None, compare=False, repr=False)
    ranks: tuple[int, ...] = field(default=(0,), compare=False, repr=False)
    name: str = field(default="", compare=False)


SINGLE = Group(rank=0, size=1)


@dataclass(frozen=True)
class ParallelContext:
    """Everything a part may want to know about where it runs."""

    device: torch.device
    world: Group = SINGLE
    dp: Group = SINGLE  # the same layers and tokens' columns, other rows
    tp: Group = SINGLE  # the same layers and tokens, other parts of the matrices
    cp: Group = SINGLE  # the same layers and rows, other columns
    pp: Group = SINGLE  # the same rows and columns, other layers
    zero: Group = SINGLE  # dp x cp: gradients are summed over it, ZeRO divides state over it
    model: Group = SINGLE  # tp x pp: together they hold one copy of the model
    kv: Group = SINGLE  # ranks of tp that hold copies of the same key-value heads
    ends: Group = SINGLE  # first and last stage, where both use a tied embedding; SINGLE elsewhere
    pp_back: Group = SINGLE  # the ranks of pp once more: gradients travel beside activations, never behind them
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and speaks for the run."""
        return self.world.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """True where tokens enter."""
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the loss is computed."""
        return self.pp.rank == self.pp.size - 1

    @property
    def counts_loss(self) -> bool:
        """True on one rank of each model copy's last stage: summing over the ranks where it holds counts every token once."""
        return self.tp.rank == 0 and self.is_last_stage

    def named_groups(self) -> dict[str, Group]:
        """The groups that communicate, by name."""
        names = ("world", "zero", "model", "tp", "cp", "dp", "pp", "pp_back", "ends", "kv")
        return {name: group for name in names if (group := getattr(self, name)).size > 1}
