"""The activations of an MLP, gelu and swiglu, with the biases before and the dropout behind them."""

from dist_llm.kernels.activation.native import gelu_native, swiglu_native, why_not_native
from dist_llm.kernels.activation.reference import gelu_reference, swiglu_reference
from dist_llm.kernels.impl import Impl, always

__all__ = ["GELU_IMPLS", "SWIGLU_IMPLS"]

GELU_IMPLS = (  # best first; the last one always runs
    Impl("activation", "native", gelu_native, why_not_native),
    Impl("activation", "reference", gelu_reference, always),
)

SWIGLU_IMPLS = (
    Impl("activation", "native", swiglu_native, why_not_native),
    Impl("activation", "reference", swiglu_reference, always),
)
