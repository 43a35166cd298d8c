"""Rows of a table by number in plain PyTorch: the definition."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["embedding_backward_into_reference", "embedding_reference"]


def embedding_reference(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight[ids] in ``dtype``; the gradient of a row is the sum over its tokens, in fp32 and rounded once.

    Args:
        ids: (...) int64, each at least 0 and below V.
        weight: (V, D), fp32 or bf16. fp64 stays fp64, whatever ``dtype``: tests measure errors against it.
        dtype: of the result.

    Returns:
        (..., D) in ``dtype``.

    Raises:
        IndexError: an id is out of range.
    """
    rows: torch.Tensor = _Rows.apply(ids, weight, weight.dtype if weight.dtype == torch.float64 else dtype)  # type: ignore[no-untyped-call]
    return rows


class _Rows(torch.autograd.Function):
    """A gather and a cast. torch's own gradient of a gather adds in the dtype of the table, and widening the table before would copy it all."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.weight_dtype = weight.shape[0], weight.dtype
        return weight.index_select(0, ids.reshape(-1)).reshape(*ids.shape, weight.shape[1]).to(dtype)

    @staticmethod
    def backward(ctx: Any, drows: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (ids,) = ctx.saved_tensors
        wide = torch.promote_types(ctx.weight_dtype, torch.float32)
        dim = drows.shape[-1]
        dweight = drows.new_zeros(ctx.num_rows, dim, dtype=wide).index_add_(0, ids.reshape(-1), drows.reshape(-1, dim).to(wide))
        return None, dweight.to(ctx.weight_dtype), None


def embedding_backward_into_reference(grad_out: torch.Tensor, ids: torch.Tensor, weight_grad: torch.Tensor) -> None:
    """Add the gradient of a table to ``weight_grad``, in fp32 and rounded once.

    Args:
        grad_out: (..., D), gradient of the rows.
        ids: (...) int64, each at least 0 and below V.
        weight_grad: (V, D), fp32 or bf16, written in place.

    Raises:
        IndexError: an id is out of range.
    """
    wide = torch.promote_types(weight_grad.dtype, torch.float32)
    rows = grad_out.detach().to(wide).reshape(-1, weight_grad.shape[1])
    with torch.no_grad():
        weight_grad.copy_(weight_grad.to(wide).index_add(0, ids.reshape(-1), rows))
