"""LayerNorm, alone and with the residual addition before it."""

from dist_llm.kernels.impl import Impl, always
from dist_llm.kernels.layer_norm.apex import layer_norm_apex, layer_norm_residual_apex, why_not_apex
from dist_llm.kernels.layer_norm.native import layer_norm_native, layer_norm_residual_native, why_not_native
from dist_llm.kernels.layer_norm.reference import layer_norm_reference, layer_norm_residual_reference

__all__ = ["IMPLS", "RESIDUAL_IMPLS"]

IMPLS = (  # best first; the last one always runs
    Impl("layer_norm", "native", layer_norm_native, why_not_native),
    Impl("layer_norm", "apex", layer_norm_apex, why_not_apex),
    Impl("layer_norm", "reference", layer_norm_reference, always),
)

RESIDUAL_IMPLS = (
    Impl("layer_norm", "native", layer_norm_residual_native, why_not_native),
    Impl("layer_norm", "apex", layer_norm_residual_apex, why_not_apex),
    Impl("layer_norm", "reference", layer_norm_residual_reference, always),
)
