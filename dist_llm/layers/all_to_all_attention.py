"""Context parallelism by exchanging heads for columns: DeepSpeed-Ulysses (Jacobs et al., arXiv:2309.14509).

Each of the cp ranks holds one contiguous chunk of every row, all heads of it. An all-to-all gives it all columns of N / cp query heads,
any attention computes them as on one rank, and a second all-to-all brings the result back. The number of heads bounds cp; where fewer
key-value heads than that do not divide among the ranks, copies go to every rank whose queries read them, and their gradients are summed.

What a rank sends in one call, in bytes, with b bytes an element and K' = N / gcd(N / cp, N / K) heads of keys, copies included (K' = K
where K is divisible by cp):

- forward   (cp - 1) / cp * B T (N + 2 K') H b in one all-to-all (q, k and v together), (cp - 1) / cp * B T N H b in another (the result),
  and one all-gather of doc_ids: (cp - 1) B T times the size of an id
- backward  the same two all-to-alls, in the other order

B batch, T columns of this rank, N query heads, K key and value heads, H head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.comm.autograd import gather_from_group
from dist_llm.comm.context import Group
from dist_llm.layers.attention import AttentionFn

__all__ = ["all_to_all_attention"]


def all_to_all_attention(fn: AttentionFn, cp: Group) -> AttentionFn:
    """Attention over whole rows whose columns are spread over ``cp``, in contiguous chunks.

    Args:
        fn: attention of one rank, any implementation of the attention table.
        cp: the ranks, all of which call what is returned.

    Returns:
        a function with the signature of ``fn``; q (B, T, N, H), k and v (B, T, K, H) and doc_ids (B, T) are this rank's columns.
        It raises ``ValueError`` where the heads do not divide among the ranks.
    """

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        doc_ids: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        if cp.size == 1:
            return fn(q, k, v, causal=causal, doc_ids=doc_ids, alibi_slopes=alibi_slopes, **options)
        _check(q, k, v, doc_ids, cp)
        if doc_ids is not None:
            options["doc_ids"] = gather_from_group(doc_ids, cp, dim=1)
        if alibi_slopes is not None:
            options["alibi_slopes"] = alibi_slopes.chunk(cp.size)[cp.rank]
        heads = _ColumnsToHeads.apply(q, k, v, cp)  # type: ignore[no-untyped-call]
        return _HeadsToColumns.apply(fn(*heads, causal=causal, **options), cp)  # type: ignore[no-untyped-call]

    return attend


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_ids: torch.Tensor | None, cp: Group) -> None:
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_heads % cp.size != 0:
        raise ValueError(
            f"all-to-all attention divides heads: the {num_heads} query heads of this rank must be divisible by cp ({cp.size});"
            " use parallel.cp_kind = ring, which does not, or a cp that divides them"
        )
    if num_heads % num_kv_heads != 0:
        raise ValueError(f"query heads ({num_heads}) must be a multiple of key and value heads ({num_kv_heads})")
    if k.shape[:2] != q.shape[:2] or v.shape != k.shape:
        raise ValueError(
            f"all-to-all attention takes q (B, T, N, H) and k, v (B, T, K, H) of the same columns, not {tuple(q.shape)},"
            f" {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if doc_ids is not None and doc_ids.shape != q.shape[:2]:
        raise ValueError(f"doc_ids {tuple(doc_ids.shape)} must be (B, T) = {tuple(q.shape[:2])}, of this rank's columns")


def _exchange(parts: torch.Tensor, cp: Group) -> torch.Tensor:
    """parts[j] goes to rank j; what comes from rank j is at j."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=cp.handle)
    return received


def _to_heads(tensors: tuple[torch.Tensor, ...], cp: Group) -> tuple[torch.Tensor, ...]:
    """(B, T, cp * n, H) each, n differing, to this rank's n heads of all columns, (B, cp * T, n, H), in one exchange."""
    by_rank = [t.reshape(*t.shape[:2], cp.size, t.shape[2] // cp.size, t.shape[3]) for t in tensors]
    received = _exchange(torch.cat(by_rank, dim=3).movedim(2, 0), cp)
    whole = received.transpose(0, 1).flatten(1, 2)
    return torch.split(whole, [t.shape[3] for t in by_rank], dim=2)


def _to_columns(tensors: tuple[torch.Tensor, ...], cp: Group) -> tuple[torch.Tensor, ...]:
    """The way back: (B, cp * T, n, H) each to all heads of this rank's columns, (B, T, cp * n, H)."""
    whole = torch.cat(tensors, dim=2) if len(tensors) > 1 else tensors[0]
    by_columns = whole.reshape(whole.shape[0], cp.size, whole.shape[1] // cp.size, *whole.shape[2:])
    received = _exchange(by_columns.transpose(0, 1), cp)
    by_rank = torch.split(received.movedim(0, 2), [t.shape[2] for t in tensors], dim=3)
    return tuple(t.flatten(2, 3) for t in by_rank)


def _sum_copies(grad: torch.Tensor, copies: int) -> torch.Tensor:
    """(B, T, K * copies, H) to (B, T, K, H), in fp32 and rounded once."""
    by_copy = grad.reshape(*grad.shape[:2], grad.shape[2] // copies, copies, grad.shape[3])
    return by_copy.sum(3, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)


class _ColumnsToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cp: Group) -> tuple[torch.Tensor, ...]:
        num_heads, num_kv_heads = q.shape[2], k.shape[2]
        # As many neighbouring query heads as are on one rank and read the same keys: one head of keys, or a copy, for each such run.
        run = math.gcd(num_heads // cp.size, num_heads // num_kv_heads)
        ctx.cp, ctx.copies = cp, num_heads // num_kv_heads // run
        if ctx.copies > 1:
            k, v = (t.repeat_interleave(ctx.copies, dim=2) for t in (k, v))
        return _to_heads((q, k, v), cp)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dq, dk, dv = _to_columns(grads, ctx.cp)
        if ctx.copies > 1:
            dk, dv = (_sum_copies(t, ctx.copies) for t in (dk, dv))
        return dq, dk, dv, None


class _HeadsToColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, cp: Group) -> torch.Tensor:
        ctx.cp = cp
        return _to_columns((out,), cp)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _to_heads((grad,), ctx.cp)[0], None
