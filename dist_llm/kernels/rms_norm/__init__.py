"""RMSNorm, alone and with the residual addition before it."""

from dist_llm.kernels.impl import Impl, always
from dist_llm.kernels.rms_norm.apex import rms_norm_apex, rms_norm_residual_apex, why_not_apex
from dist_llm.kernels.rms_norm.native import rms_norm_native, rms_norm_residual_native, why_not_native
from dist_llm.kernels.rms_norm.reference import rms_norm_reference, rms_norm_residual_reference

__all__ = ["IMPLS", "RESIDUAL_IMPLS"]

IMPLS = (  # best first; the last one always runs
    Impl("rms_norm", "native", rms_norm_native, why_not_native),
    Impl("rms_norm", "apex", rms_norm_apex, why_not_apex),
    Impl("rms_norm", "reference", rms_norm_reference, always),
)

RESIDUAL_IMPLS = (
    Impl("rms_norm", "native", rms_norm_residual_native, why_not_native),
    Impl("rms_norm", "apex", rms_norm_residual_apex, why_not_apex),
    Impl("rms_norm", "reference", rms_norm_residual_reference, always),
)
