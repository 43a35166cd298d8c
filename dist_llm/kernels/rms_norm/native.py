"""RMSNorm in C++ and CUDA: schemas, shapes without data, and gradients. The device code is in csrc/rms_norm/.

Forward saves the input of the norm and one fp32 number a row; backward reads both once. The gradient of the weight is summed in
fp32, in an order that depends on the shape only: the same bits twice, and at any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_llm.kernels.extension import why_no_kernel
from dist_llm.kernels.strides import contiguous

__all__ = ["rms_norm_native", "rms_norm_residual_native", "why_not_native"]

torch.library.define("dist_llm::rms_norm", "(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)")
torch.library.define(
    "dist_llm::rms_norm_residual", "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor summed, Tensor rstd)"
)
torch.library.define(
    "dist_llm::rms_norm_backward", "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? dsummed) -> (Tensor dx, Tensor dweight)"
)

Tensors = tuple[torch.Tensor, ...]
Grads = tuple[torch.Tensor | None, ...]


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot run, or None. Loads the extension at the first call."""
    return why_no_kernel("rms_norm", device, dtype)


def _fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Tensors:
    del weight, eps
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Tensors:
    del residual, weight, eps
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, dsummed: torch.Tensor | None) -> Tensors:
    del dy, rstd, dsummed
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    _, _, weight, _ = inputs
    _, summed, rstd = output
    ctx.save_for_backward(summed, weight, rstd)
    # A result nobody used sends None instead of a tensor of zeros as large as x.
    ctx.set_materialize_grads(False)


# Gradients can arrive with any strides (that of a sum is one number, repeated), the kernels want them contiguous.
# rstd is for backward only; nothing flows through it.


def _backward(ctx: Any, dy: torch.Tensor, drstd: torch.Tensor | None) -> Grads:
    del drstd
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.dist_llm.rms_norm_backward(dy.contiguous(), x, weight, rstd, None)
    return dx, dweight, None


def _backward_residual(ctx: Any, dy: torch.Tensor | None, dsummed: torch.Tensor | None, drstd: torch.Tensor | None) -> Grads:
    del drstd
    if dy is None:
        return dsummed, dsummed, None, None
    summed, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.dist_llm.rms_norm_backward(dy.contiguous(), summed, weight, rstd, contiguous(dsummed))
    # x and residual enter as a sum, so one gradient is both's.
    return dx, dx, dweight, None


torch.library.register_fake("dist_llm::rms_norm", _fake)
torch.library.register_fake("dist_llm::rms_norm_residual", _fake_residual)
torch.library.register_fake("dist_llm::rms_norm_backward", _fake_backward)
torch.library.register_autograd("dist_llm::rms_norm", _backward, setup_context=_save)
torch.library.register_autograd("dist_llm::rms_norm_residual", _backward_residual, setup_context=_save_residual)


def rms_norm_native(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``rms_norm_reference`` in one pass over memory; ask ``why_not_native`` first, as ``select`` does.

    Args:
        x: (..., D), fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
        weight: (D,), dtype of x or fp32.
        eps: added to the mean.

    Returns:
        (..., D), dtype of x.

    Raises:
        RuntimeError: a shape or a dtype is none of these; the message names it.
    """
    y: torch.Tensor = torch.ops.dist_llm.rms_norm(x.contiguous(), weight, eps)[0]
    return y


def rms_norm_residual_native(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm_residual_reference`` in one pass over memory; ask ``why_not_native`` first, as ``select`` does.

    Args:
        x: (..., D), fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
        residual: like x.
        weight: (D,), dtype of x or fp32.
        eps: added to the mean.

    Returns:
        (..., D) and (..., D), dtype of x.

    Raises:
        RuntimeError: a shape or a dtype is none of these; the message names it.
    """
    y, summed, _ = torch.ops.dist_llm.rms_norm_residual(x.contiguous(), residual.contiguous(), weight, eps)
    return y, summed
