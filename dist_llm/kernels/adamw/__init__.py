"""AdamW with clipping and the cast of the parameters in one pass, and the sum of squares that clipping starts from."""

from __future__ import annotations

import torch

from dist_llm.kernels.adamw.native import adamw_step_native, global_sum_of_squares_native, why_not_native
from dist_llm.kernels.adamw.reference import adamw_step_reference, adamw_step_torch, global_sum_of_squares_reference
from dist_llm.kernels.impl import Impl, always

__all__ = ["IMPLS", "SUM_OF_SQUARES_IMPLS"]


def why_not_torch(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's fused AdamW cannot run, or None."""
    del dtype
    supported = ("cpu", "cuda")
    return None if device.type in supported else f"torch's fused AdamW is here used on {' and '.join(supported)}, not on {device.type}"


IMPLS = (  # best first; the last one always runs
    Impl("adamw", "native", adamw_step_native, why_not_native),
    Impl("adamw", "torch", adamw_step_torch, why_not_torch),
    Impl("adamw", "reference", adamw_step_reference, always),
)

SUM_OF_SQUARES_IMPLS = (
    Impl("adamw", "native", global_sum_of_squares_native, why_not_native),
    Impl("adamw", "torch", global_sum_of_squares_reference, why_not_torch),
    Impl("adamw", "reference", global_sum_of_squares_reference, always),
)
