"""Rotary position embedding."""

from dist_llm.kernels.impl import Impl, always
from dist_llm.kernels.rotary.native import rotary_native, why_not_native
from dist_llm.kernels.rotary.reference import rotary_reference

__all__ = ["IMPLS"]

IMPLS = (  # best first; the last one always runs
    Impl("rotary", "native", rotary_native, why_not_native),
    Impl("rotary", "reference", rotary_reference, always),
)
