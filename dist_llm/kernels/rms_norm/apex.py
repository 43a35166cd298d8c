"""RMSNorm by NVIDIA's apex, where it is installed with its extension ``fused_layer_norm_cuda``: NVIDIA GPUs, fp32, fp16 and bf16.

Apex adds no residual, so that form is an addition and the norm. With fp32 weights its "mixed" function returns fp32, which is rounded here.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

__all__ = ["rms_norm_apex", "rms_norm_residual_apex", "why_not_apex"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def load_apex() -> tuple[ModuleType | None, str]:
    """Apex's functions, and why not when they are None. Apex installs without its extension and then fails at the first call."""
    try:
        importlib.import_module("fused_layer_norm_cuda")
        functions = importlib.import_module("apex.normalization.fused_layer_norm")
    except ImportError as error:
        return None, f"apex with its fused_layer_norm_cuda extension cannot be imported: {error}"
    missing = [name for name in ("fused_rms_norm_affine", "mixed_dtype_fused_rms_norm_affine") if not hasattr(functions, name)]
    return (None, f"this apex is too old: it has no {missing[0]}") if missing else (functions, "")


def why_not_apex(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why apex cannot be used, or None."""
    if device.type != "cuda":
        return f"apex runs on NVIDIA GPUs, not on {device.type}"
    if dtype not in DTYPES:
        return f"apex takes {', '.join(map(str, DTYPES))}, not {dtype}"
    functions, reason = load_apex()
    return reason if functions is None else None


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
    functions, reason = load_apex()
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
