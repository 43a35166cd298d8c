"""Collectives that gradients pass through, as pairs of forward and backward.

Each is the identity on a group of one. Sums are taken in the dtype of the tensor: callers that need fp32 cast before.

| function | forward | backward |
| --- | --- | --- |
| copy_to_group | identity | all-reduce |
| reduce_from_group | all-reduce | identity |
| gather_from_group | all-gather along a dimension | reduce-scatter |
| reduce_scatter_to_group | reduce-scatter along a dimension | all-gather |

The first two are f and g of Shoeybi et al. (arXiv:1909.08053), the others those of sequence parallelism, Korthikanti et al.
(arXiv:2205.05198, section 4.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dist_llm.comm.context import Group

__all__ = ["copy_to_group", "gather_from_group", "reduce_from_group", "reduce_scatter_to_group"]


def copy_to_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Identity forward; backward sums the gradients of all ranks, each of which used ``x`` for another part of the result."""
    return x if group.size == 1 else _Copy.apply(x, group)  # type: ignore[no-untyped-call]


def reduce_from_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum over the ranks; backward hands the gradient to each."""
    return x if group.size == 1 else _Reduce.apply(x, group)  # type: ignore[no-untyped-call]


def gather_from_group(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Parts of all ranks, in rank order along ``dim``; backward sums and returns each rank's part."""
    return x if group.size == 1 else _Gather.apply(x, group, dim)  # type: ignore[no-untyped-call]


def reduce_scatter_to_group(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """This rank's part along ``dim`` of the sum over the ranks; backward gathers the parts.

    Raises:
        ValueError: ``dim`` is not divisible by the group's size.
    """
    return x if group.size == 1 else _ReduceScatter.apply(x, group, dim)  # type: ignore[no-untyped-call]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _scatter_sum(grad, ctx.group, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _scatter_sum(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _gather(grad, ctx.group, ctx.dim), None, None


def _sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)  # the collective works in place
    dist.all_reduce(total, group=group.handle)
    return total


def _gather(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    # The collective joins along the first dimension, so the one wanted is brought there and back.
    part = x.detach().movedim(dim, 0).contiguous()
    whole = part.new_empty((group.size * part.shape[0], *part.shape[1:]))
    dist.all_gather_into_tensor(whole, part, group=group.handle)
    return whole.movedim(0, dim).contiguous()


def _scatter_sum(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    if x.shape[dim] % group.size != 0:
        raise ValueError(f"dimension {dim} of {tuple(x.shape)} must be divisible by the {group.size} ranks of {group.name}")
    whole = x.detach().movedim(dim, 0).contiguous()
    part = whole.new_empty((whole.shape[0] // group.size, *whole.shape[1:]))
    dist.reduce_scatter_tensor(part, whole, group=group.handle)
    return part.movedim(0, dim).contiguous()
