"""Softmax attention: causal or bidirectional, grouped-query heads, packed documents, sliding window, ALiBi, soft cap, decoding with a cache.

Whole, or over a part of the keys at a time: results of parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch

from dist_llm.kernels.attention.block import attention_reference_backward, attention_reference_block
from dist_llm.kernels.attention.flash_attn import attention_flash, attention_flash_lse, why_not_flash
from dist_llm.kernels.attention.native import (
    attention_native,
    attention_native_backward,
    attention_native_block,
    attention_native_lse,
    why_not_native,
)
from dist_llm.kernels.attention.reference import attention_reference, attention_reference_lse
from dist_llm.kernels.attention.sdpa import attention_sdpa
from dist_llm.kernels.impl import Impl, always

__all__ = ["BLOCK_BACKWARD_IMPLS", "BLOCK_IMPLS", "IMPLS", "LSE_IMPLS"]


def why_no_sdpa_block(device: torch.device, dtype: torch.dtype) -> str:
    """Why torch's own attention cannot compute a part of the keys: an answer for whoever asks for it by name."""
    del device, dtype
    return (
        "torch's scaled_dot_product_attention returns no log-sum-exp, by which ring attention merges the keys of several ranks"
        " (parallel.cp_kind = all_to_all runs on any implementation)"
    )


def why_no_flash_block(device: torch.device, dtype: torch.dtype) -> str:
    """Why flash-attn cannot compute a part of the keys: an answer for whoever asks for it by name."""
    del device, dtype
    return (
        "flash-attn has no gradient of a part of the keys from the log-sum-exp of the whole row, which ring attention needs"
        " (parallel.cp_kind = all_to_all runs on any implementation)"
    )


IMPLS = (  # best first; the last one always runs
    Impl("attention", "flash_attn", attention_flash, why_not_flash),
    Impl("attention", "native", attention_native, why_not_native),
    Impl("attention", "sdpa", attention_sdpa, always),
    Impl("attention", "reference", attention_reference, always),
)

# With the log-sum-exp, which torch's own attention does not give: for attention over keys that are spread over ranks.
LSE_IMPLS = (
    Impl("attention", "flash_attn", attention_flash_lse, why_not_flash),
    Impl("attention", "native", attention_native_lse, why_not_native),
    Impl("attention", "reference", attention_reference_lse, always),
)

# The two halves of ring attention's step, for it alone. Both follow the same config key and run under the same conditions, so the
# same name is taken for both.
BLOCK_IMPLS = (
    Impl("attention", "flash_attn", attention_reference_block, why_no_flash_block),
    Impl("attention", "native", attention_native_block, why_not_native),
    Impl("attention", "sdpa", attention_reference_block, why_no_sdpa_block),
    Impl("attention", "reference", attention_reference_block, always),
)
BLOCK_BACKWARD_IMPLS = (
    Impl("attention", "flash_attn", attention_reference_backward, why_no_flash_block),
    Impl("attention", "native", attention_native_backward, why_not_native),
    Impl("attention", "sdpa", attention_reference_backward, why_no_sdpa_block),
    Impl("attention", "reference", attention_reference_backward, always),
)
