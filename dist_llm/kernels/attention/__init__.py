"""Softmax attention: causal or bidirectional, grouped-query heads, documents packed in one row, decoding with a cache."""

from dist_llm.kernels.attention.reference import attention_reference
from dist_llm.kernels.attention.sdpa import attention_sdpa
from dist_llm.kernels.impl import Impl, always

__all__ = ["IMPLS"]

IMPLS = (  # best first; the last one always runs
    Impl("attention", "sdpa", attention_sdpa, always),
    Impl("attention", "reference", attention_reference, always),
)
