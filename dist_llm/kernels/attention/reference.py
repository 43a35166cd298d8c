"""Attention in plain PyTorch, with the mask in full: the definition (Vaswani et al., arXiv:1706.03762).

B batch, T queries, S keys, N query heads, K key and value heads, H head dim.
"""

from __future__ import annotations

import torch

__all__ = ["attention_reference", "attention_reference_lse", "check_arguments", "check_final", "position_bias", "scores", "visible"]


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    doc_ids: torch.Tensor | None,
    query_doc_ids: torch.Tensor | None = None,
    window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    """Refuse arguments that attention is not defined for.

    Raises:
        ValueError: naming the shapes and the rule.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention takes q (B, T, N, H) and k, v (B, S, K, H), not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"query heads ({q.shape[2]}) must be a multiple of key and value heads ({k.shape[2]})")
    if query_doc_ids is not None:
        if doc_ids is None:
            raise ValueError("query_doc_ids come with doc_ids, the documents of the keys, which are None")
        if causal or window is not None or alibi_slopes is not None:
            raise ValueError(
                f"with query_doc_ids the queries have no place among the keys, so causal ({causal}), window ({window}) and alibi_slopes"
                f" ({None if alibi_slopes is None else 'given'}) mean nothing: leave them out, or leave query_doc_ids out"
            )
        if query_doc_ids.shape != q.shape[:2] or query_doc_ids.dtype != doc_ids.dtype:
            raise ValueError(
                f"query_doc_ids {tuple(query_doc_ids.shape)} {query_doc_ids.dtype} must be (B, T) = {tuple(q.shape[:2])} in the dtype of"
                f" doc_ids, {doc_ids.dtype}: the document of every query"
            )
    has_positions = causal or window is not None or alibi_slopes is not None or (doc_ids is not None and query_doc_ids is None)
    if q.shape[1] > k.shape[1] and has_positions:
        raise ValueError(f"{q.shape[1]} queries are the last tokens of {k.shape[1]} keys: there cannot be more queries than keys")
    if doc_ids is not None and doc_ids.shape != k.shape[:2]:
        raise ValueError(f"doc_ids {tuple(doc_ids.shape)} must be (B, S) = {tuple(k.shape[:2])}: the document of every key")
    if window is not None and window < 1:
        raise ValueError(f"window ({window}) must be at least 1: the query's own token")
    if alibi_slopes is not None and alibi_slopes.shape != (q.shape[2],):
        raise ValueError(f"alibi_slopes {tuple(alibi_slopes.shape)} must have one slope for each of the {q.shape[2]} query heads")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap ({soft_cap}) must be positive")


def check_final(dout: torch.Tensor, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Refuse a result that cannot belong to these queries.

    Raises:
        ValueError: naming the shapes and dtypes.
    """
    if dout.shape != q.shape or out.shape != q.shape or dout.dtype != q.dtype or out.dtype != q.dtype:
        raise ValueError(
            f"dout {tuple(dout.shape)} {dout.dtype} and out {tuple(out.shape)} {out.dtype} must be like q, {tuple(q.shape)} {q.dtype}"
        )
    wide = torch.promote_types(q.dtype, torch.float32)
    if lse.shape != (q.shape[0], q.shape[2], q.shape[1]) or lse.dtype != wide:
        raise ValueError(
            f"lse {tuple(lse.shape)} {lse.dtype} must be (B, N, T) = {(q.shape[0], q.shape[2], q.shape[1])} in {wide}: over all keys"
        )


def visible(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    doc_ids: torch.Tensor | None,
    device: torch.device,
    query_doc_ids: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor | None:
    """Which keys each query sees.

    Returns:
        bool, (B, 1, T, S) with doc_ids, (T, S) without, None when every query sees every key.
    """
    # The queries are the last tokens of the row: with a cache of earlier keys, query i stands at position S - T + i.
    first = num_keys - num_queries
    mask = None
    if causal:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(first)
    if window is not None:
        near = _distance(num_queries, num_keys, device) < window
        mask = near if mask is None else near & mask
    if doc_ids is not None:
        of_queries = doc_ids[:, first:] if query_doc_ids is None else query_doc_ids
        same_document = (of_queries[:, :, None] == doc_ids[:, None, :])[:, None]
        mask = same_document if mask is None else same_document & mask
    return mask


def position_bias(num_queries: int, num_keys: int, slopes: torch.Tensor) -> torch.Tensor:
    """ALiBi (Press et al., arXiv:2108.12409): a head's scores fall by its slope for every token between query and key.

    Args:
        num_queries: T, the last of the keys' tokens.
        num_keys: S.
        slopes: (N,).

    Returns:
        (N, T, S), dtype of ``slopes``, to be added to the scores.
    """
    return -slopes[:, None, None] * _distance(num_queries, num_keys, slopes.device)


def _distance(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """Tokens from each query's position to each key, (T, S)."""
    keys = torch.arange(num_keys, device=device)
    return (keys[num_keys - num_queries :, None] - keys[None, :]).abs()


def scores(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool,
    doc_ids: torch.Tensor | None,
    query_doc_ids: torch.Tensor | None,
    scale: float | None,
    window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """What the softmax is taken of, (B, N, T, S) in fp32 (fp64 from fp64); -inf where a query does not see a key.

    Args: as ``attention_reference_lse``.
    """
    wide = torch.promote_types(q.dtype, torch.float32)  # fp64 stays fp64: tests measure errors against it
    k_BSNH = k.to(wide).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores_BNTS = torch.einsum("btnh,bsnh->bnts", q.to(wide), k_BSNH) * (q.shape[3] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores_BNTS = soft_cap * torch.tanh(scores_BNTS / soft_cap)
    if alibi_slopes is not None:
        scores_BNTS = scores_BNTS + position_bias(q.shape[1], k.shape[1], alibi_slopes.to(wide))
    mask = visible(q.shape[1], k.shape[1], causal=causal, doc_ids=doc_ids, device=q.device, query_doc_ids=query_doc_ids, window=window)
    return scores_BNTS if mask is None else scores_BNTS.masked_fill(~mask, float("-inf"))


def attention_reference_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    doc_ids: torch.Tensor | None = None,
    query_doc_ids: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``attention_reference``, and what its softmax divides by: attention over other keys can then be merged with it.

    Args: as ``attention_reference``, and
        query_doc_ids: (B, T) integers that never fall along a row, the documents of queries that stand elsewhere in the row than the
            keys: a query sees the keys of equal id, however many, or none. None: the queries are the last T of the S tokens.

    Returns:
        (B, T, N, H) in the dtype of q, and the log of the sum of the exponentials of the scores, (B, N, T), fp32 (fp64 from fp64).
        A query that sees no key has zeros and -inf, and no gradient.
    """
    check_arguments(
        *(q, k, v),
        causal=causal,
        doc_ids=doc_ids,
        query_doc_ids=query_doc_ids,
        window=window,
        alibi_slopes=alibi_slopes,
        soft_cap=soft_cap,
    )
    scores_BNTS = scores(
        *(q, k),
        causal=causal,
        doc_ids=doc_ids,
        query_doc_ids=query_doc_ids,
        scale=scale,
        window=window,
        alibi_slopes=alibi_slopes,
        soft_cap=soft_cap,
    )
    v_BSNH = v.to(scores_BNTS.dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    if query_doc_ids is None:
        probabilities, lse = scores_BNTS.softmax(-1), scores_BNTS.logsumexp(-1)
    else:
        # The softmax of nothing is NaN, and so is its gradient: such queries get finite scores first and no weight after.
        sees_none = (scores_BNTS == float("-inf")).all(-1, keepdim=True)
        seen_BNTS = scores_BNTS.masked_fill(sees_none, 0.0)
        probabilities = seen_BNTS.softmax(-1).masked_fill(sees_none, 0.0)
        lse = seen_BNTS.logsumexp(-1).masked_fill(sees_none[..., 0], float("-inf"))
    return torch.einsum("bnts,bsnh->btnh", probabilities, v_BSNH).to(q.dtype), lse


def attention_reference(
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
    """softmax(scale q k^T) v over the keys a query may see, in fp32 and rounded once.

    Args:
        q: (B, T, N, H): the last T of S tokens.
        k: (B, S, K, H), N a multiple of K; query head n reads key head n // (N / K).
        v: (B, S, K, H).
        causal: a query sees no later key.
        doc_ids: (B, S) integers that never fall along a row; a query sees only keys of its own document. None: one document a row.
        scale: factor of the scores; default 1 / sqrt(H).
        window: a query sees only keys fewer than this many tokens away (1: itself alone). None: any distance.
        alibi_slopes: (N,), fp32: scores fall by the head's slope for every token between query and key. A constant: no gradient.
        soft_cap: scaled scores s become soft_cap * tanh(s / soft_cap), before ALiBi. None: they stay.

    Returns:
        (B, T, N, H), dtype of q.
    """
    return attention_reference_lse(
        q, k, v, causal=causal, doc_ids=doc_ids, scale=scale, window=window, alibi_slopes=alibi_slopes, soft_cap=soft_cap
    )[0]
