"""Rotary position embedding in C++ and CUDA: schema, shape without data, and gradient. The device code is in csrc/rotary/.

One pass over x, where it lies: queries and keys that are parts of one projection are not copied first. Backward turns the gradient by the
negative angle and keeps nothing but the tables.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_llm.kernels.extension import why_no_kernel
from dist_llm.kernels.rotary.reference import check_rotary
from dist_llm.kernels.strides import last_dim_contiguous

__all__ = ["rotary_native", "why_not_native"]

torch.library.define("dist_llm::rotary", "(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor")


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot run, or None. Loads the extension at the first call."""
    return why_no_kernel("rotary", device, dtype)


def _fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    del cos, sin, inverse
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    _, cos, sin, inverse = inputs
    ctx.save_for_backward(cos, sin)
    ctx.inverse = inverse


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return torch.ops.dist_llm.rotary(last_dim_contiguous(dy), cos, sin, not ctx.inverse), None, None, None


torch.library.register_fake("dist_llm::rotary", _fake)
torch.library.register_autograd("dist_llm::rotary", _backward, setup_context=_save)


def rotary_native(x_BTNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``rotary_reference`` in one pass over memory; ask ``why_not_native`` first, as ``select`` does.

    Args:
        x_BTNH: (B, T, N, H) queries or keys, fp32 or bf16 (CUDA: fp16 too), H even; copied only when the elements of a head are not
            side by side.
        cos: (B, T, 1, H/2) float32, the cosine of the angle of each position and pair; B and T may be 1, and hold for all then.
        sin: like cos.

    Returns:
        (B, T, N, H), dtype of x, contiguous.

    Raises:
        ValueError: a shape is wrong, or a table requires a gradient: there is none.
    """
    check_rotary(x_BTNH, cos, sin)
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin are tables of positions: the compiled rotary has no gradient of them; detach them")
    y: torch.Tensor = torch.ops.dist_llm.rotary(last_dim_contiguous(x_BTNH), _table(cos, x_BTNH), _table(sin, x_BTNH), False)
    return y


def _table(table: torch.Tensor, x_BTNH: torch.Tensor) -> torch.Tensor:
    if table.shape[:2] != x_BTNH.shape[:2]:
        table = table.expand(*x_BTNH.shape[:2], -1, -1)
    return last_dim_contiguous(table)
