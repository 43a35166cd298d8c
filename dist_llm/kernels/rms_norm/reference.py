"""RMSNorm in plain PyTorch: the definition (Zhang and Sennrich, arXiv:1910.07467)."""

from __future__ import annotations

import torch

__all__ = ["rms_norm_reference", "rms_norm_residual_reference"]


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension, in fp32 and rounded once.

    Args:
        x: (..., D), fp32 or bf16. fp64 is computed in fp64: tests measure errors against it.
        weight: (D,), dtype of x or fp32.
        eps: added to the mean.

    Returns:
        (..., D), dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * rstd * weight.to(wide)).to(x.dtype)


def rms_norm_residual_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of ``x + residual``, and that sum, which is the next residual.

    Args:
        x: (..., D), what a layer adds to the residual stream.
        residual: like x.
        weight: (D,), dtype of x or fp32.
        eps: added to the mean.

    Returns:
        (..., D) and (..., D), dtype of x. The sum is rounded to that dtype before the norm sees it.
    """
    summed = x + residual
    return rms_norm_reference(summed, weight, eps), summed
