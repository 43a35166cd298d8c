"""LayerNorm in plain PyTorch: the definition (Ba et al., arXiv:1607.06450)."""

from __future__ import annotations

import torch

__all__ = ["layer_norm_reference", "layer_norm_residual_reference"]


def layer_norm_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, mean and biased variance over the last dimension, in fp32 and rounded once.

    Args:
        x: (..., D), fp32 or bf16. fp64 is computed in fp64: tests measure errors against it.
        weight: (D,), dtype of x or fp32.
        bias: like weight, or None.
        eps: added to the variance.

    Returns:
        (..., D), dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    centered = x_wide - x_wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    y = centered * rstd * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)


def layer_norm_residual_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of ``x + residual``, and that sum, which is the next residual.

    Args:
        x: (..., D), what a layer adds to the residual stream.
        residual: like x.
        weight: (D,), dtype of x or fp32.
        bias: like weight, or None.
        eps: added to the variance.

    Returns:
        (..., D) and (..., D), dtype of x. The sum is rounded to that dtype before the norm sees it.
    """
    summed = x + residual
    return layer_norm_reference(summed, weight, bias, eps), summed
