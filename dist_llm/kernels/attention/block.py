"""Attention of queries over a part of their keys, in plain PyTorch: what is merged where the keys of a row are spread over ranks.

softmax over all keys = sum over parts of exp(lse_part - lse) out_part, with lse = log(sum exp(lse_part)): parts are computed one by
one and merged in fp32 (Liu et al., arXiv:2310.01889). Backward needs no part's own softmax: given the lse of all keys the probability of any
key is exp(score - lse), so each part of the keys adds its share to dq and has its whole dk and dv of these queries.

B batch, T queries, S keys, N query heads, K key and value heads, H head dim.
"""

from __future__ import annotations

import torch

from dist_llm.kernels.attention.reference import attention_reference_lse, check_arguments, check_final, scores

__all__ = ["attention_reference_backward", "attention_reference_block"]


def attention_reference_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    doc_ids: torch.Tensor | None = None,
    query_doc_ids: torch.Tensor | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``attention_reference_lse`` whose result is not rounded: it is to be merged with other keys' first.

    Args: as ``attention_reference_lse``.

    Returns:
        (B, T, N, H) and the log-sum-exp (B, N, T), both fp32 (fp64 from fp64). A query that sees no key has zeros and -inf.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    return attention_reference_lse(
        *(t.to(wide) for t in (q, k, v)), causal=causal, doc_ids=doc_ids, query_doc_ids=query_doc_ids, scale=scale, soft_cap=soft_cap
    )


def attention_reference_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    doc_ids: torch.Tensor | None = None,
    query_doc_ids: torch.Tensor | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients by q, k and v of attention that saw these keys among others.

    Args:
        dout: (B, T, N, H), the gradient by ``out``.
        q: (B, T, N, H).
        k: (B, S, K, H), the part of the keys at hand.
        v: (B, S, K, H).
        out: (B, T, N, H), the result over all keys, dtype of q.
        lse: (B, N, T), the log-sum-exp over all keys, fp32 (fp64 from fp64).
        causal: a query sees no later key; the queries are then the last T of these S tokens.
        doc_ids: (B, S), or None.
        query_doc_ids: (B, T), or None: the queries are among the keys.
        scale: factor of the scores; default 1 / sqrt(H).
        soft_cap: bound of the scores, or None.

    Returns:
        what these keys add to dq (B, T, N, H), and dk and dv (B, S, K, H) of these queries, all fp32 (fp64 from fp64).
    """
    check_arguments(q, k, v, causal=causal, doc_ids=doc_ids, query_doc_ids=query_doc_ids, soft_cap=soft_cap)
    check_final(dout, q, out, lse)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores_BNTS = scores(q, k, causal=causal, doc_ids=doc_ids, query_doc_ids=query_doc_ids, scale=scale, soft_cap=soft_cap)
    wide, heads_per_key = scores_BNTS.dtype, q.shape[2] // k.shape[2]
    k_BSNH, v_BSNH = (t.to(wide).repeat_interleave(heads_per_key, dim=2) for t in (k, v))
    q_BTNH, out_BTNH, dout_BTNH = q.to(wide), out.to(wide), dout.to(wide)
    # A query that sees no key anywhere has lse = -inf and no probabilities; exp(-inf - -inf) would be NaN.
    lse_BNT1 = lse.masked_fill(lse == float("-inf"), 0.0)[..., None]
    p_BNTS = torch.exp(scores_BNTS - lse_BNT1)
    delta_BNT1 = (dout_BTNH * out_BTNH).sum(-1).transpose(1, 2)[..., None]
    ds_BNTS = p_BNTS * (torch.einsum("btnh,bsnh->bnts", dout_BTNH, v_BSNH) - delta_BNT1)
    if soft_cap is not None:
        # d/dx c tanh(x / c) = 1 - tanh^2; hidden scores are -inf, and their ds is 0 already.
        ds_BNTS = ds_BNTS * (1 - (scores_BNTS.masked_fill(scores_BNTS == float("-inf"), 0.0) / soft_cap) ** 2)
    dq = torch.einsum("bnts,bsnh->btnh", ds_BNTS, k_BSNH) * scale
    dk = torch.einsum("bnts,btnh->bsnh", ds_BNTS, q_BTNH) * scale
    dv = torch.einsum("bnts,btnh->bsnh", p_BNTS, dout_BTNH)
    # Query heads that share a key and value head add up.
    dk, dv = (t.view(*k.shape[:3], heads_per_key, k.shape[3]).sum(3) for t in (dk, dv))
    return dq, dk, dv
