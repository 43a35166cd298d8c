"""Softmax attention: causal or bidirectional, grouped-query heads, packed documents, sliding window, ALiBi, soft cap, decoding with a cache."""

from dist_llm.kernels.attention.native import attention_native, attention_native_lse, why_not_native
from dist_llm.kernels.attention.reference import attention_reference, attention_reference_lse
from dist_llm.kernels.attention.sdpa import attention_sdpa
from dist_llm.kernels.impl import Impl, always

__all__ = ["IMPLS", "LSE_IMPLS"]

IMPLS = (  # best first; the last one always runs
    Impl("attention", "native", attention_native, why_not_native),
    Impl("attention", "sdpa", attention_sdpa, always),
    Impl("attention", "reference", attention_reference, always),
)

# With the log-sum-exp, which torch's own attention does not give: for attention over keys that are spread over ranks.
LSE_IMPLS = (
    Impl("attention", "native", attention_native_lse, why_not_native),
    Impl("attention", "reference", attention_reference_lse, always),
)
