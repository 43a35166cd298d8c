"""From the integers of the rank grid to the process groups of one rank.

A rank creates only the groups it belongs to, axis by axis in one fixed order, so that the cost does not grow with the world.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from dist_llm.comm.context import SINGLE, Group, ParallelContext
from dist_llm.topology.grid import RankGrid

__all__ = ["build_context"]


def build_context(
    grid: RankGrid,
    rank: int,
    device: torch.device,
    *,
    kv_heads: int | None = None,
    local_rank: int = 0,
    local_size: int = 1,
) -> ParallelContext:
    """The groups of ``rank``; every rank of the world calls this, after torch.distributed has been initialised.

    Args:
        grid: sizes of the axes tp, cp, dp and pp, and their order.
        rank: in the world.
        device: where it computes.
        kv_heads: key-value heads of the model: with fewer than tp ranks, neighbours in tp hold copies of the same head.
        local_rank: among the ranks of this node.
        local_size: ranks of this node.
    """
    everybody = tuple(range(grid.size))
    world = Group(rank=rank, size=grid.size, handle=dist.group.WORLD, ranks=everybody, name="world")
    known = {everybody: world}

    def group(name: str, ranks: tuple[int, ...], *, shared: bool = True) -> Group:
        if len(ranks) == 1:
            return SINGLE
        # Two axes may have the same ranks (dp and zero without cp): one process group serves both, under the first name.
        if not shared or ranks not in known:
            made = _make(name, ranks, rank)
            return made if not shared else known.setdefault(ranks, made)
        return known[ranks]

    tp = group("tp", grid.group_of(rank, "tp"))
    cp = group("cp", grid.group_of(rank, "cp"))
    pp_ranks = grid.group_of(rank, "pp")
    pp = group("pp", pp_ranks)
    dp = group("dp", grid.group_of(rank, "dp"))
    # DeepSpeed communicates in these two even where they are a rank alone, and no handle would mean the world to it.
    alone = _make("alone", (rank,), rank)
    zero_ranks, model_ranks = grid.group_of(rank, ("cp", "dp")), grid.group_of(rank, ("tp", "pp"))
    zero = group("zero", zero_ranks) if len(zero_ranks) > 1 else alone
    model = group("model", model_ranks) if len(model_ranks) > 1 else alone
    kv = ends = pp_back = SINGLE
    copies = max(1, tp.size // kv_heads) if kv_heads is not None else 1
    if copies > 1:
        first = tp.rank // copies * copies
        kv = group("kv", tp.ranks[first : first + copies])
    if pp.size > 1:
        pp_back = group("pp_back", pp_ranks, shared=False)
        if pp.rank in (0, pp.size - 1):
            ends = group("ends", (pp_ranks[0], pp_ranks[-1]), shared=False)
        else:
            _make("alone", (rank,), rank)  # nobody uses it: every rank makes as many groups as any other, see _make
    return ParallelContext(
        device=device,
        world=world,
        dp=dp,
        tp=tp,
        cp=cp,
        pp=pp,
        zero=zero,
        model=model,
        kv=kv,
        ends=ends,
        pp_back=pp_back,
        local_rank=local_rank,
        local_size=local_size,
    )


def _make(name: str, ranks: tuple[int, ...], rank: int) -> Group:
    # Only the members meet; the others need not even know. torch derives the name by which they meet from their ranks and from how
    # many groups this process has, so all ranks must make equally many: otherwise the next grid built in this process hangs.
    handle = dist.new_group(list(ranks), use_local_synchronization=True)
    return Group(rank=ranks.index(rank), size=len(ranks), handle=handle, ranks=ranks, name=name)
