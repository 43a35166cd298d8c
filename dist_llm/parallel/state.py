"""Whole logical tensors from the parts that ranks hold.

ZeRO's partitions are put together before (engine/deepspeed.py); here the parts of tensor-parallel ranks are joined, and what
lives on a later pipeline stage is sent to the main rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from dist_llm.comm.context import Group, ParallelContext
from dist_llm.config.schema import ModelConfig
from dist_llm.planning.count import parameter_shapes
from dist_llm.planning.shards import local_shape, tensor_slice

__all__ = ["join_parts", "whole_tensors"]


def whole_tensors(
    model: ModelConfig,
    ctx: ParallelContext,
    *,
    stage_of: Callable[[str], int],
    part: Callable[[str], torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every logical tensor in the model's order; whole on the main rank, unspecified on others. All ranks iterate to the end.

    Args:
        model: the whole model.
        ctx: where this rank stands.
        stage_of: rank in pp that holds a name.
        part: this rank's part of a name it holds, fp32; asked for on every rank of that stage, at the same time.
    """
    # The column of the grid that the main rank stands in sends to it; the others have the same tensors.
    is_with_main = ctx.tp.rank == 0 and ctx.zero.rank == 0
    for name, shape in parameter_shapes(model).items():
        stage = stage_of(name)
        whole = torch.empty(0)
        if stage == ctx.pp.rank:
            whole = join_parts(name, shape, part(name), model, ctx.tp)
        if stage != 0 and is_with_main:
            if ctx.pp.rank == stage:
                dist.send(whole.contiguous(), group=ctx.pp.handle, group_dst=0)
            elif ctx.pp.rank == 0:
                whole = torch.empty(shape, dtype=torch.float32, device=ctx.device)
                dist.recv(whole, group=ctx.pp.handle, group_src=stage)
        yield name, whole


def join_parts(name: str, shape: tuple[int, ...], part: torch.Tensor, model: ModelConfig, tp: Group) -> torch.Tensor:
    """The logical tensor ``name`` from the parts of all tp ranks, on each of them."""
    mine = tensor_slice(name, model, tp.size, tp.rank)
    if mine is None:
        return part
    sizes = [local_shape(name, shape, model, tp.size, rank)[mine.dim] for rank in range(tp.size)]
    # One collective for parts of unequal size: all are padded to the largest, with the divided dimension in front.
    front = part.detach().movedim(mine.dim, 0)
    padded = front.new_zeros((max(sizes), *front.shape[1:]))
    padded[: front.shape[0]] = front
    gathered = padded.new_empty((tp.size * padded.shape[0], *padded.shape[1:]))
    dist.all_gather_into_tensor(gathered, padded, group=tp.handle)
    parts = gathered.view(tp.size, *padded.shape)
    first_copies = [rank for rank in range(tp.size) if rank % mine.copies == 0]
    return torch.cat([parts[rank][: sizes[rank]] for rank in first_copies]).movedim(0, mine.dim).contiguous()
