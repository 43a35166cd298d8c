"""LayerNorm in C++ and CUDA: schemas, shapes without data, and gradients. The device code is in csrc/layer_norm/.

Forward saves the input of the norm and two fp32 numbers a row; backward reads its arguments from memory once. The gradients of weight
and bias are summed in fp32, in an order that depends on the shape only: the same bits twice, and at any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_llm.kernels.extension import why_no_kernel
from dist_llm.kernels.strides import contiguous

__all__ = ["layer_norm_native", "layer_norm_residual_native", "why_not_native"]

torch.library.define("dist_llm::layer_norm", "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)")
torch.library.define(
    "dist_llm::layer_norm_residual",
    "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor summed, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "dist_llm::layer_norm_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, Tensor? dsummed, bool with_bias) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
)

Tensors = tuple[torch.Tensor, ...]
Grads = tuple[torch.Tensor | None, ...]


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot run, or None. Loads the extension at the first call."""
    return why_no_kernel("layer_norm", device, dtype)


def _row_numbers(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> Tensors:
    del weight, bias, eps
    return torch.empty_like(x), _row_numbers(x), _row_numbers(x)


def _fake_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> Tensors:
    del residual, weight, bias, eps
    return torch.empty_like(x), torch.empty_like(x), _row_numbers(x), _row_numbers(x)


def _fake_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dsummed: torch.Tensor | None,
    with_bias: bool,
) -> Tensors:
    del dy, mean, rstd, dsummed
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[0] if with_bias else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.with_bias = bias is not None


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    _, _, weight, bias, _ = inputs
    _, summed, mean, rstd = output
    ctx.save_for_backward(summed, weight, mean, rstd)
    ctx.with_bias = bias is not None
    # A result nobody used sends None instead of a tensor of zeros as large as x.
    ctx.set_materialize_grads(False)


# Gradients can arrive with any strides (that of a sum is one number, repeated), the kernels want them contiguous.
# mean and rstd are for backward only; nothing flows through them.


def _backward(ctx: Any, dy: torch.Tensor, dmean: torch.Tensor | None, drstd: torch.Tensor | None) -> Grads:
    del dmean, drstd
    dx, dweight, dbias = torch.ops.dist_llm.layer_norm_backward(dy.contiguous(), *ctx.saved_tensors, None, ctx.with_bias)
    return dx, dweight, dbias if ctx.with_bias else None, None


def _backward_residual(
    ctx: Any, dy: torch.Tensor | None, dsummed: torch.Tensor | None, dmean: torch.Tensor | None, drstd: torch.Tensor | None
) -> Grads:
    del dmean, drstd
    if dy is None:
        return dsummed, dsummed, None, None, None
    dx, dweight, dbias = torch.ops.dist_llm.layer_norm_backward(dy.contiguous(), *ctx.saved_tensors, contiguous(dsummed), ctx.with_bias)
    # x and residual enter as a sum, so one gradient is both's.
    return dx, dx, dweight, dbias if ctx.with_bias else None, None


torch.library.register_fake("dist_llm::layer_norm", _fake)
torch.library.register_fake("dist_llm::layer_norm_residual", _fake_residual)
torch.library.register_fake("dist_llm::layer_norm_backward", _fake_backward)
torch.library.register_autograd("dist_llm::layer_norm", _backward, setup_context=_save)
torch.library.register_autograd("dist_llm::layer_norm_residual", _backward_residual, setup_context=_save_residual)


def layer_norm_native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``layer_norm_reference`` in one pass over memory; ask ``why_not_native`` first, as ``select`` does.

    Args:
        x: (..., D), fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
        weight: (D,), dtype of x or fp32.
        bias: like weight, or None.
        eps: added to the variance.

    Returns:
        (..., D), dtype of x.

    Raises:
        RuntimeError: a shape or a dtype is none of these; the message names it.
    """
    y: torch.Tensor = torch.ops.dist_llm.layer_norm(x.contiguous(), weight, bias, eps)[0]
    return y


def layer_norm_residual_native(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``layer_norm_residual_reference`` in one pass over memory; ask ``why_not_native`` first, as ``select`` does.

    Args:
        x: (..., D), fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
        residual: like x.
        weight: (D,), dtype of x or fp32.
        bias: like weight, or None.
        eps: added to the variance.

    Returns:
        (..., D) and (..., D), dtype of x.

    Raises:
        RuntimeError: a shape or a dtype is none of these; the message names it.
    """
    y, summed, _, _ = torch.ops.dist_llm.layer_norm_residual(x.contiguous(), residual.contiguous(), weight, bias, eps)
    return y, summed
