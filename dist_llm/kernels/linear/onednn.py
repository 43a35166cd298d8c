"""Linear layers by oneDNN with the bias added inside the product. CPU, bf16.

torch's ``addmm`` on CPU first copies the bias into every row of the result and then adds the product to it: one more pass over the
result, 5 to 25 % of a layer of a small model. oneDNN adds the bias while a tile of the result is in registers. The gradient of the bias is
summed over the rows as a matrix, which torch does several times faster than over two dimensions of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

__all__ = ["linear_onednn", "why_not_onednn"]


def why_not_onednn(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why oneDNN's fused product cannot be used, or None."""
    if device.type != "cpu":
        return f"it is for CPU, not {device.type}"
    if dtype != torch.bfloat16:
        return f"it takes torch.bfloat16, not {dtype}"
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN takes bf16 only on processors with AVX-512 (BW, VL, DQ)"
    return None


def linear_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``linear_reference``; ask ``why_not_onednn`` first, as ``select`` does.

    Args:
        x: (..., K) bf16.
        weight: (N, K) bf16.
        bias: (N,) bf16, or None.

    Returns:
        (..., N) bf16.
    """
    if x.numel() == 0 or weight.numel() == 0:
        return torch.nn.functional.linear(x, weight, bias)  # oneDNN refuses empty products
    y: torch.Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = torch.mm(rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        dweight = torch.mm(rows.t(), x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        dbias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dx, dweight, dbias
