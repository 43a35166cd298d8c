"""RMSNorm by NVIDIA's apex, where it is installed with its extension ``fused_layer_norm_cuda``: NVIDIA GPUs, fp32, fp16 and bf16.

Apex adds no residual, so that form is an addition and the norm. With fp32 weights its "mixed" function returns fp32, which is rounded here.
"""

from __future__ import annotations

import torch

from dist_llm.kernels.apex import load_apex, why_no_apex

__all__ = ["rms_norm_apex", "rms_norm_residual_apex", "why_not_apex"]


def why_not_apex(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why apex cannot be used, or None."""
    return why_no_apex("rms_norm", device, dtype)


def rms_norm_apex(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``rms_norm_reference`` by apex; ask ``why_not_apex`` first, as ``select`` does.

    Args:
        x: (..., D), fp32, fp16 or bf16.
        weight: (D,), dtype of x or fp32.
        eps: added to the mean.

    Returns:
        (..., D), dtype of x.

    Raises:
        ValueError: apex is not installed.
    """
    functions, reason = load_apex("rms_norm")
    if functions is None:
        raise ValueError(f"kernels.rms_norm = apex: {reason}")
    fn = functions.fused_rms_norm_affine if weight.dtype == x.dtype else functions.mixed_dtype_fused_rms_norm_affine
    y: torch.Tensor = fn(x, weight, weight.shape, eps)
    return y.to(x.dtype)


def rms_norm_residual_apex(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm_residual_reference``: a sum, and apex's norm of it.

    Args:
        x: (..., D), fp32, fp16 or bf16.
        residual: like x.
        weight: (D,), dtype of x or fp32.
        eps: added to the mean.

    Returns:
        (..., D) and (..., D), dtype of x.

    Raises:
        ValueError: apex is not installed.
    """
    summed = x + residual
    return rms_norm_apex(summed, weight, eps), summed
