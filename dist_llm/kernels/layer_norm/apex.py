"""LayerNorm by NVIDIA's apex, where it is installed with its extension ``fused_layer_norm_cuda``: NVIDIA GPUs, fp32, fp16 and bf16.

Apex adds no residual, so that form is an addition and the norm. With fp32 weights its "mixed" function returns fp32, which is rounded here.
It has no form with a weight and no bias: zeros stand for none.
"""

from __future__ import annotations

import torch

from dist_llm.kernels.apex import load_apex, why_no_apex

__all__ = ["layer_norm_apex", "layer_norm_residual_apex", "why_not_apex"]


def why_not_apex(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why apex cannot be used, or None."""
    return why_no_apex("layer_norm", device, dtype)


def layer_norm_apex(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``layer_norm_reference`` by apex; ask ``why_not_apex`` first, as ``select`` does.

    Args:
        x: (..., D), fp32, fp16 or bf16.
        weight: (D,), dtype of x or fp32.
        bias: like weight, or None.
        eps: added to the variance.

    Returns:
        (..., D), dtype of x.

    Raises:
        ValueError: apex is not installed.
    """
    functions, reason = load_apex("layer_norm")
    if functions is None:
        raise ValueError(f"kernels.layer_norm = apex: {reason}")
    fn = functions.fused_layer_norm_affine if weight.dtype == x.dtype else functions.mixed_dtype_fused_layer_norm_affine
    y: torch.Tensor = fn(x, weight, torch.zeros_like(weight) if bias is None else bias, weight.shape, eps)
    return y.to(x.dtype)


def layer_norm_residual_apex(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``layer_norm_residual_reference``: a sum, and apex's norm of it.

    Args:
        x: (..., D), fp32, fp16 or bf16.
        residual: like x.
        weight: (D,), dtype of x or fp32.
        bias: like weight, or None.
        eps: added to the variance.

    Returns:
        (..., D) and (..., D), dtype of x.

    Raises:
        ValueError: apex is not installed.
    """
    summed = x + residual
    return layer_norm_apex(summed, weight, bias, eps), summed
