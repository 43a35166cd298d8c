"""Attention in plain PyTorch, with the mask in full: the definition (Vaswani et al., arXiv:1706.03762).

B batch, T queries, S keys, N query heads, K key and value heads, H head dim.
"""

from __future__ import annotations

import torch

__all__ = ["attention_reference", "check_arguments", "visible"]


def check_arguments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, doc_ids: torch.Tensor | None) -> None:
    """Refuse arguments that attention is not defined for.

    Raises:
        ValueError: naming the shapes and the rule.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention takes q (B, T, N, H) and k, v (B, S, K, H), not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"query heads ({q.shape[2]}) must be a multiple of key and value heads ({k.shape[2]})")
    if q.shape[1] > k.shape[1] and (causal or doc_ids is not None):
        raise ValueError(f"{q.shape[1]} queries are the last tokens of {k.shape[1]} keys: there cannot be more queries than keys")
    if doc_ids is not None and doc_ids.shape != k.shape[:2]:
        raise ValueError(f"doc_ids {tuple(doc_ids.shape)} must be (B, S) = {tuple(k.shape[:2])}: the document of every key")


def visible(num_queries: int, num_keys: int, *, causal: bool, doc_ids: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Which keys each query sees.

    Returns:
        bool, (B, 1, T, S) with doc_ids, (T, S) when only causal, None when every query sees every key.
    """
    # The queries are the last tokens of the row: with a cache of earlier keys, query i stands at position S - T + i.
    first = num_keys - num_queries
    mask = None
    if causal:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(first)
    if doc_ids is not None:
        same_document = (doc_ids[:, first:, None] == doc_ids[:, None, :])[:, None]
        mask = same_document if mask is None else same_document & mask
    return mask


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    doc_ids: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T) v over the keys a query may see, in fp32 and rounded once.

    Args:
        q: (B, T, N, H): the last T of S tokens.
        k: (B, S, K, H), N a multiple of K; query head n reads key head n // (N / K).
        v: (B, S, K, H).
        causal: a query sees no later key.
        doc_ids: (B, S) integers; a query sees only keys of its own document. None: one document a row.
        scale: factor of the scores; default 1 / sqrt(H).

    Returns:
        (B, T, N, H), dtype of q.
    """
    check_arguments(q, k, v, causal=causal, doc_ids=doc_ids)
    wide = torch.promote_types(q.dtype, torch.float32)  # fp64 stays fp64: tests measure errors against it
    heads_per_key = q.shape[2] // k.shape[2]
    k_BSNH = k.to(wide).repeat_interleave(heads_per_key, dim=2)
    v_BSNH = v.to(wide).repeat_interleave(heads_per_key, dim=2)
    scores_BNTS = torch.einsum("btnh,bsnh->bnts", q.to(wide), k_BSNH) * (q.shape[3] ** -0.5 if scale is None else scale)
    mask = visible(q.shape[1], k.shape[1], causal=causal, doc_ids=doc_ids, device=q.device)
    if mask is not None:
        scores_BNTS = scores_BNTS.masked_fill(~mask, float("-inf"))
    return torch.einsum("bnts,bsnh->btnh", scores_BNTS.softmax(-1), v_BSNH).to(q.dtype)
