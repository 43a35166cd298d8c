"""A linear layer for each group of rows: on CPU torch's product on views, one after another, on CUDA one grouped product.

On CPU each group's product reads its rows and its weight where they lie and writes into its place in the result; nothing is copied and
nothing is allocated for a group. The number of rows of a group is known there at no cost. On CUDA it is known to the device:

- sm_90 and later, bf16, both widths multiples of 8: ``torch._grouped_mm`` reads it there, nothing is synchronised;
- otherwise the products are launched one after another, and the counts must first reach the host: one synchronisation a call.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch

__all__ = ["grouped_linear"]

torch.library.define("dist_llm::moe_grouped_linear", "(Tensor rows, Tensor counts, Tensor weight) -> Tensor")
torch.library.define(
    "dist_llm::moe_grouped_linear_backward",
    "(Tensor dout, Tensor rows, Tensor counts, Tensor weight, bool needs_rows, bool needs_weight) -> (Tensor drows, Tensor dweight)",
)
# Writes zeros into the rows from sum(counts) on; reads the counts where they are.
torch.library.define("dist_llm::moe_zero_rest_", "(Tensor(a!) rows, Tensor counts) -> ()")

# Rows and widths of a grouped product begin at multiples of 16 bytes.
ALIGNED_BF16 = 8


def _groups(counts: torch.Tensor, num_rows: int) -> tuple[list[tuple[int, int]], int]:
    """First row of each group and one after its last, and the rows of all, on the host.

    Raises:
        ValueError: a count is negative, or they add up to more than the rows.
    """
    sizes = counts.tolist()
    bounds = [0, *accumulate(sizes)]
    if min(sizes, default=0) < 0 or bounds[-1] > num_rows:
        raise ValueError(f"counts {sizes} must not be negative, nor add up to more than the number of rows ({num_rows})")
    return list(pairwise(bounds)), bounds[-1]


def _linear_by_group(rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    groups, used = _groups(counts, rows.shape[0])
    for expert, (begin, end) in enumerate(groups):
        if end > begin:
            torch.mm(rows[begin:end], weight[expert].t(), out=out[begin:end])
    out[used:].zero_()
    return out


def _backward_by_group(
    dout: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor, needs_rows: bool, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    drows, dweight = _new_grads(rows, weight, needs_rows, needs_weight)
    groups, used = _groups(counts, rows.shape[0])
    for expert, (begin, end) in enumerate(groups):
        arriving = dout[begin:end]
        if needs_rows and end > begin:
            torch.mm(arriving, weight[expert], out=drows[begin:end])
        if needs_weight and end > begin:
            torch.mm(arriving.t(), rows[begin:end], out=dweight[expert])
        elif needs_weight:
            dweight[expert].zero_()
    if needs_rows:
        drows[used:].zero_()
    return drows, dweight


def _new_grads(rows: torch.Tensor, weight: torch.Tensor, needs_rows: bool, needs_weight: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for both gradients; empty for one that nobody asks for."""
    return rows.new_empty(rows.shape if needs_rows else (0,)), weight.new_empty(weight.shape if needs_weight else (0,))


def _has_grouped_product(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these CUDA tensors."""
    return (
        rows.dtype == torch.bfloat16
        and rows.shape[0] > 0
        and all(width % ALIGNED_BF16 == 0 for width in weight.shape[1:])
        and torch.cuda.get_device_capability(rows.device) >= (9, 0)
        and bool(torch._C._dispatch_has_kernel_for_dispatch_key("dist_llm::moe_zero_rest_", "CUDA"))
    )


def _linear_cuda(rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not _has_grouped_product(rows, weight):
        return _linear_by_group(rows, counts, weight)
    ends = counts.cumsum(0, dtype=torch.int32)
    out = torch._grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    torch.ops.dist_llm.moe_zero_rest_(out, counts)
    return out


def _backward_cuda(
    dout: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor, needs_rows: bool, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _has_grouped_product(rows, weight):
        return _backward_by_group(dout, rows, counts, weight, needs_rows, needs_weight)
    ends = counts.cumsum(0, dtype=torch.int32)
    drows, dweight = _new_grads(rows, weight, False, False)
    if needs_rows:
        drows = torch._grouped_mm(dout, weight, offs=ends)
        torch.ops.dist_llm.moe_zero_rest_(drows, counts)
    if needs_weight:
        dweight = torch._grouped_mm(dout.t(), rows, offs=ends)
    return drows, dweight


def _fake(rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    del counts
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _fake_backward(
    dout: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor, needs_rows: bool, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    del dout, counts
    return _new_grads(rows, weight, needs_rows, needs_weight)


def _fake_zero_rest(rows: torch.Tensor, counts: torch.Tensor) -> None:
    del rows, counts


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
    needs_rows, _, needs_weight = ctx.needs_input_grad
    grads = torch.ops.dist_llm.moe_grouped_linear_backward(dout.contiguous(), *ctx.saved_tensors, needs_rows, needs_weight)
    return grads[0] if needs_rows else None, None, grads[1] if needs_weight else None


torch.library.impl("dist_llm::moe_grouped_linear", "cpu", _linear_by_group)
torch.library.impl("dist_llm::moe_grouped_linear", "cuda", _linear_cuda)
torch.library.impl("dist_llm::moe_grouped_linear_backward", "cpu", _backward_by_group)
torch.library.impl("dist_llm::moe_grouped_linear_backward", "cuda", _backward_cuda)
torch.library.register_fake("dist_llm::moe_grouped_linear", _fake)
torch.library.register_fake("dist_llm::moe_grouped_linear_backward", _fake_backward)
torch.library.register_fake("dist_llm::moe_zero_rest_", _fake_zero_rest)
torch.library.register_autograd("dist_llm::moe_grouped_linear", _backward, setup_context=_save)


def grouped_linear(rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows @ weight[e]^T for the rows of each group e, in the dtype of ``rows``.

    Args:
        rows: (R, K), sorted by group; the first sum(counts) belong to groups.
        counts: (E,), int32, rows of each group. Not negative; they add up to at most R.
        weight: (E, N, K), dtype of rows, or fp32 masters, which are cast.

    Returns:
        (R, N), dtype of rows; zeros for the rows that belong to no group, which take no part in any gradient. That of ``weight`` is zeros
        for a group without rows.

    Raises:
        ValueError: counts do not fit; not on CUDA where that would need a synchronisation.
    """
    out: torch.Tensor = torch.ops.dist_llm.moe_grouped_linear(rows.contiguous(), counts, weight.to(rows.dtype).contiguous())
    return out
