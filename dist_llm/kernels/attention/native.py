"""Attention in C++: schemas, shapes without data, and gradients. The device code is in csrc/attention/.

Forward saves its result and one fp32 number a query and head; backward recomputes the probabilities block by block, so that no T x S
matrix exists at any time. Both have the same bits twice, and at any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_llm.kernels.attention.reference import check_arguments, check_final
from dist_llm.kernels.extension import why_no_kernel
from dist_llm.kernels.strides import contiguous, last_dim_contiguous

__all__ = ["attention_native", "attention_native_backward", "attention_native_block", "attention_native_lse", "why_not_native"]

# window 0 and soft_cap 0 stand for none. fp32_out: out, or dq, dk and dv, are fp32 whatever the dtype of q.
torch.library.define(
    "dist_llm::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? doc_ids, Tensor? query_doc_ids, Tensor? alibi_slopes, bool causal, int window, float scale,"
    " float soft_cap, bool fp32_out) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "dist_llm::attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? doc_ids, Tensor? query_doc_ids,"
    " Tensor? alibi_slopes, bool causal, int window, float scale, float soft_cap, bool fp32_out) -> (Tensor dq, Tensor dk, Tensor dv)",
)

Tensors = tuple[torch.Tensor, ...]
Grads = tuple[torch.Tensor | None, ...]


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot run, or None. Loads the extension at the first call."""
    return why_no_kernel("attention", device, dtype)


def _fake(q: torch.Tensor, *options: Any) -> Tensors:
    dtype = torch.float32 if options[-1] else q.dtype
    return q.new_empty(q.shape, dtype=dtype), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _fake_backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> Tensors:
    del dout, dlse
    dtype = torch.float32 if options[-1] else q.dtype
    return q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype), v.new_empty(v.shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    q, k, v, doc_ids, query_doc_ids, alibi_slopes, *options, _ = inputs
    ctx.save_for_backward(q, k, v, *output, doc_ids, query_doc_ids, alibi_slopes)
    ctx.options = options
    # Mostly nobody uses the log-sum-exp; its gradient is then None instead of a tensor of zeros.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Grads:
    q, k, v, out, lse, doc_ids, query_doc_ids, alibi_slopes = ctx.saved_tensors
    # An fp32 result of bf16 queries is rounded here, as the kernel wants one dtype.
    out = out.to(q.dtype)
    dq, dk, dv = torch.ops.dist_llm.attention_backward(
        torch.zeros_like(out) if dout is None else last_dim_contiguous(dout.to(q.dtype)),
        contiguous(dlse),
        *(q, k, v, out, lse, doc_ids, query_doc_ids, alibi_slopes),
        *ctx.options,
        False,
    )
    return dq, dk, dv, *[None] * 8


torch.library.register_fake("dist_llm::attention", _fake)
torch.library.register_fake("dist_llm::attention_backward", _fake_backward)
torch.library.register_autograd("dist_llm::attention", _backward, setup_context=_save)


def attention_native_lse(
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
    """``attention_reference_lse`` block by block; ask ``why_not_native`` first, as ``select`` does.

    Args:
        q: (B, T, N, H): the last T of S tokens, or tokens from elsewhere in the row with ``query_doc_ids``; fp32 or bf16 (CUDA:
            fp16 too, and H up to 256).
        k: (B, S, K, H), N a multiple of K, dtype of q.
        v: (B, S, K, H), dtype of q.
        causal: a query sees no later key.
        doc_ids: (B, S), int32 or int64, never falling along a row, or None. Falling ones are an error on CPU; on CUDA, where finding out
            would stop the queue, the results of that row are NaN.
        query_doc_ids: (B, T), dtype of doc_ids, never falling along a row, or None: the queries are among the keys.
        scale: factor of the scores; default 1 / sqrt(H).
        window: a query sees only keys fewer than this many tokens away, or None.
        alibi_slopes: (N,), constant, or None.
        soft_cap: bound of the scores, or None.

    Returns:
        (B, T, N, H) in the dtype of q, and the log of the sum of the exponentials of the scores, (B, N, T), fp32. Both have a gradient.
        A query that sees no key has zeros and -inf.

    Raises:
        ValueError: the arguments do not fit one another, or the slopes ask for a gradient, which this op does not compute.
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
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes require a gradient, which native attention does not compute; detach them")
    out, lse = torch.ops.dist_llm.attention(
        *(last_dim_contiguous(t) for t in (q, k, v)),
        contiguous(doc_ids),
        contiguous(query_doc_ids),
        None if alibi_slopes is None else alibi_slopes.float().contiguous(),
        causal,
        window or 0,
        q.shape[3] ** -0.5 if scale is None else scale,
        soft_cap or 0.0,
        False,
    )
    return out, lse


def attention_native(
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
    """``attention_reference`` block by block; ask ``why_not_native`` first, as ``select`` does.

    Args: as ``attention_native_lse``.

    Returns:
        (B, T, N, H), dtype of q.
    """
    return attention_native_lse(
        q, k, v, causal=causal, doc_ids=doc_ids, scale=scale, window=window, alibi_slopes=alibi_slopes, soft_cap=soft_cap
    )[0]


def attention_native_block(
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
    """``attention_reference_block`` in C++. Gradients are those of ``attention_native_backward``, with the whole row's result.

    Args: as ``attention_native_lse``.

    Returns:
        (B, T, N, H) and (B, N, T), both fp32.
    """
    check_arguments(q, k, v, causal=causal, doc_ids=doc_ids, query_doc_ids=query_doc_ids, soft_cap=soft_cap)
    out, lse = torch.ops.dist_llm.attention(
        *(last_dim_contiguous(t) for t in (q, k, v)),
        contiguous(doc_ids),
        contiguous(query_doc_ids),
        None,
        causal,
        0,
        q.shape[3] ** -0.5 if scale is None else scale,
        soft_cap or 0.0,
        True,
    )
    return out, lse


def attention_native_backward(
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
    """``attention_reference_backward`` in C++, block by block.

    Args: as ``attention_reference_backward``; tensors fp32 or bf16.

    Returns:
        what these keys add to dq (B, T, N, H), and dk and dv (B, S, K, H) of these queries, all fp32.
    """
    check_arguments(q, k, v, causal=causal, doc_ids=doc_ids, query_doc_ids=query_doc_ids, soft_cap=soft_cap)
    check_final(dout, q, out, lse)
    dq, dk, dv = torch.ops.dist_llm.attention_backward(
        last_dim_contiguous(dout),
        None,
        *(last_dim_contiguous(t) for t in (q, k, v, out)),
        lse.contiguous(),
        contiguous(doc_ids),
        contiguous(query_doc_ids),
        None,
        causal,
        0,
        q.shape[3] ** -0.5 if scale is None else scale,
        soft_cap or 0.0,
        True,
    )
    return dq, dk, dv
