"""Attention by torch's scaled_dot_product_attention, which picks a fused kernel where it has one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dist_llm.kernels.attention.reference import attention_reference, check_arguments, position_bias, visible

__all__ = ["attention_sdpa"]


def attention_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    doc_ids: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """``attention_reference``, fused where torch can: documents, windows and ALiBi cost a mask of T x S.

    Args:
        q: (B, T, N, H): the last T of S tokens.
        k: (B, S, K, H), N a multiple of K.
        v: (B, S, K, H).
        causal: a query sees no later key.
        doc_ids: (B, S) integers, the document of each key, or None.
        scale: factor of the scores; default 1 / sqrt(H).
        window: a query sees only keys fewer than this many tokens away, or None.
        alibi_slopes: (N,), or None.
        soft_cap: bound of the scores, or None; torch's kernel has none, so with it the reference computes.

    Returns:
        (B, T, N, H), dtype of q.
    """
    if soft_cap is not None:
        return attention_reference(
            q, k, v, causal=causal, doc_ids=doc_ids, scale=scale, window=window, alibi_slopes=alibi_slopes, soft_cap=soft_cap
        )
    check_arguments(q, k, v, causal=causal, doc_ids=doc_ids, window=window, alibi_slopes=alibi_slopes)
    num_queries, num_keys = q.shape[1], k.shape[1]
    # torch aligns its own causal mask to the first key, ours is aligned to the last: they agree only when T == S.
    use_is_causal = causal and doc_ids is None and window is None and alibi_slopes is None and num_queries == num_keys
    # A single query is the last token: it sees every key, causal or not.
    needs_mask = doc_ids is not None or window is not None or (causal and not use_is_causal and num_queries > 1)
    mask = visible(num_queries, num_keys, causal=causal, doc_ids=doc_ids, device=q.device, window=window) if needs_mask else None
    if alibi_slopes is not None:
        bias = position_bias(num_queries, num_keys, alibi_slopes.to(torch.promote_types(q.dtype, torch.float32)))
        mask = (bias if mask is None else bias.masked_fill(~mask, float("-inf"))).to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=use_is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
