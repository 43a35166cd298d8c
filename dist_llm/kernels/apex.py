"""NVIDIA's apex, imported here alone: its norms, which need its extension ``fused_layer_norm_cuda``, an NVIDIA GPU and fp32, fp16 or bf16."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

__all__ = ["load_apex", "why_no_apex"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def load_apex(op: str) -> tuple[ModuleType | None, str]:
    """The module with apex's functions of ``op`` (rms_norm or layer_norm), and why not when it is None.

    Apex installs without its extension and then fails at the first call.
    """
    try:
        importlib.import_module("fused_layer_norm_cuda")
        functions = importlib.import_module("apex.normalization.fused_layer_norm")
    except ImportError as error:
        return None, f"apex with its fused_layer_norm_cuda extension cannot be imported: {error}"
    missing = [name for name in (f"fused_{op}_affine", f"mixed_dtype_fused_{op}_affine") if not hasattr(functions, name)]
    return (None, f"this apex is too old: it has no {missing[0]}") if missing else (functions, "")


def why_no_apex(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why apex cannot be used for ``op``, or None."""
    if device.type != "cuda":
        return f"apex runs on NVIDIA GPUs, not on {device.type}"
    if dtype not in DTYPES:
        return f"apex takes {', '.join(map(str, DTYPES))}, not {dtype}"
    functions, reason = load_apex(op)
    return reason if functions is None else None
