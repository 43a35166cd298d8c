"""Ring attention: keys and values travel from rank to rank, queries stay (Liu et al., arXiv:2310.01889).

Each of the cp ranks holds two chunks of every row, r and 2 cp - 1 - r of 2 cp (``topology/sequence.py``), so that under a causal mask
all have the same work at each step. With c columns a chunk:

- own keys: causal over the 2 c columns, as if they stood side by side: their order is what counts;
- keys of an earlier rank s < r: all 2 c queries see its first chunk, none its second, which is behind them;
- keys of a later rank s > r: the second local chunk sees both of its chunks, the first sees none.

Results of the steps are merged in fp32 by their log-sum-exp and rounded once, so every cp gives the same numbers up to the order of sums.
Saved for backward are q, k, v, the result and its log-sum-exp; backward passes k and v around once more.

What a rank sends in one call, in bytes, with k and v of (B, T, K, H) on each rank and b bytes an element:

- forward   (cp - 1) * 2 B T K H b, in cp - 1 messages, and one all-gather of doc_ids: (cp - 1) B T times the size of an id
- backward  (cp - 1) * 2 B T K H (b + 4), in cp - 1 messages of k and v and as many of their gradients, in fp32 (8 for 4 from fp64)

A step's message travels while the block at hand is computed.

B batch, T columns of this rank, N query heads, K key and value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_llm.comm.autograd import gather_from_group
from dist_llm.comm.context import Group
from dist_llm.layers.attention import AttentionFn

__all__ = ["BlockBackward", "BlockForward", "ring_attention"]

# As attention_reference_block and attention_reference_backward of kernels/attention/block.py.
BlockForward = Callable[..., tuple[torch.Tensor, torch.Tensor]]
BlockBackward = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def ring_attention(forward_fn: BlockForward, backward_fn: BlockBackward, cp: Group) -> AttentionFn:
    """Causal attention over whole rows whose columns are spread over ``cp``, in zigzag.

    Args:
        forward_fn: attention over a part of the keys with its log-sum-exp (``kernels.attention.BLOCK_IMPLS``).
        backward_fn: the gradients that belong to a part of the keys (``kernels.attention.BLOCK_BACKWARD_IMPLS``).
        cp: the ranks, all of which call what is returned.

    Returns:
        a function of q (B, T, N, H), k and v (B, T, K, H) and, by keyword, causal, doc_ids (B, T), scale and soft_cap, that returns
        (B, T, N, H); all tensors are this rank's columns.
    """
    ring = _Ring(forward_fn, backward_fn, cp)

    def attend(
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
        if not causal or window is not None or alibi_slopes is not None:
            raise ValueError(
                f"ring attention is causal, without window and ALiBi: not causal={causal}, window={window},"
                f" alibi_slopes={'None' if alibi_slopes is None else 'given'}; use parallel.cp_kind = all_to_all"
            )
        if q.shape[1] % 2 != 0 or k.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"ring attention holds two chunks of each row: {q.shape[1]} queries and {k.shape[1]} keys must be the same even number"
                " of this rank's columns"
            )
        if doc_ids is not None and doc_ids.shape != q.shape[:2]:
            raise ValueError(f"doc_ids {tuple(doc_ids.shape)} must be (B, T) = {tuple(q.shape[:2])}, of this rank's columns")
        ids = None if doc_ids is None else gather_from_group(doc_ids, cp, dim=1).view(q.shape[0], cp.size, q.shape[1])
        return _RingAttention.apply(q, k, v, ids, ring, {"scale": scale, "soft_cap": soft_cap})  # type: ignore[no-untyped-call]

    return attend


@dataclass(frozen=True)
class _Transfer:
    """A message on its way to the next rank, and the previous rank's on its way here."""

    leaving: torch.Tensor  # kept until it has left
    arriving: torch.Tensor
    works: list[dist.Work]

    def wait(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        return self.arriving


@dataclass(frozen=True)
class _Ring:
    forward_fn: BlockForward
    backward_fn: BlockBackward
    cp: Group

    def start(self, message: torch.Tensor) -> _Transfer:
        """Send ``message`` to the next rank and receive the previous one's."""
        arriving = torch.empty_like(message)
        after, before = (self.cp.ranks[(self.cp.rank + step) % self.cp.size] for step in (1, -1))
        # One batch, so that NCCL starts both at once and no rank waits for the other's receive.
        transfers = [dist.P2POp(dist.isend, message, after, self.cp.handle), dist.P2POp(dist.irecv, arriving, before, self.cp.handle)]
        return _Transfer(message, arriving, dist.batch_isend_irecv(transfers))

    def block(self, step: int, num_columns: int) -> tuple[slice, slice, int]:
        """Queries and keys that meet at ``step``, and the rank whose keys they are."""
        source = (self.cp.rank - step) % self.cp.size
        everything, half = slice(0, num_columns), num_columns // 2
        if source < self.cp.rank:
            return everything, slice(0, half), source
        if source > self.cp.rank:
            return slice(half, num_columns), everything, source
        return everything, everything, source


def _documents(ids: torch.Tensor | None, here: int, source: int, queries: slice, keys: slice) -> dict[str, torch.Tensor]:
    """ids: (B, cp, T), of every rank's columns."""
    if ids is None:
        return {}
    documents = {"doc_ids": ids[:, source, keys]}
    # One's own queries are among the keys; those of another part of the row bring their documents.
    return documents if source == here else {**documents, "query_doc_ids": ids[:, here, queries]}


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor | None, ring: _Ring, options: dict[str, Any]
    ) -> torch.Tensor:
        size, here, columns = ring.cp.size, ring.cp.rank, q.shape[1]
        travelling = torch.stack((k, v))
        out_BTNH = lse_BNT = q.new_empty(0)
        for step in range(size):
            transfer = ring.start(travelling) if step + 1 < size else None
            queries, keys, source = ring.block(step, columns)
            block_out, block_lse = ring.forward_fn(
                *(q[:, queries], *(t[:, keys] for t in travelling)),
                causal=source == here,
                **_documents(ids, here, source, queries, keys),
                **options,
            )
            if step == 0:
                out_BTNH, lse_BNT = block_out, block_lse
            else:
                _merge(out_BTNH[:, queries], lse_BNT[:, :, queries], block_out, block_lse)
            if transfer is not None:
                travelling = transfer.wait()
        out_BTNH = out_BTNH.to(q.dtype)
        ctx.save_for_backward(q, k, v, out_BTNH, lse_BNT, ids)
        ctx.ring, ctx.options = ring, options
        return out_BTNH

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out_BTNH, lse_BNT, ids = ctx.saved_tensors
        ring: _Ring = ctx.ring
        size, here, columns = ring.cp.size, ring.cp.rank, q.shape[1]
        travelling = torch.stack((k, v))
        # What others add to the gradients of a rank's keys is summed in a message that follows the keys from the next rank on, and
        # comes home behind the last step. The rank's own part waits for it.
        own: tuple[torch.Tensor, ...] = ()
        dq = q.new_empty(0)
        sums: _Transfer | None = None
        for step in range(size):
            transfer = ring.start(travelling) if step + 1 < size else None
            queries, keys, source = ring.block(step, columns)
            block_dq, *block_dkv = ring.backward_fn(
                *(t[:, queries] for t in (dout, q)),
                *(t[:, keys] for t in travelling),
                out_BTNH[:, queries],
                lse_BNT[:, :, queries],
                causal=source == here,
                **_documents(ids, here, source, queries, keys),
                **ctx.options,
            )
            if step == 0:
                dq, own = block_dq, tuple(block_dkv)
            else:
                dq[:, queries] += block_dq
                so_far = block_dq.new_zeros((2, *k.shape)) if sums is None else sums.wait()
                for total, part in zip(so_far, block_dkv, strict=True):
                    total[:, keys] += part
                sums = ring.start(so_far)
            if transfer is not None:
                travelling = transfer.wait()
        dk, dv = own if sums is None else (total + part for total, part in zip(sums.wait(), own, strict=True))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _merge(out_BTNH: torch.Tensor, lse_BNT: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor) -> None:
    """Add the result over other keys to the first two, in place.

    The weight of the new part is exp(its lse) / (sum of both) = sigmoid(difference): weights add up to one whatever the rounding, and
    a part without visible keys (-inf) has none.
    """
    difference = block_lse - lse_BNT
    out_BTNH += torch.sigmoid(difference).transpose(1, 2)[..., None] * (block_out - out_BTNH)
    lse_BNT -= F.logsigmoid(-difference)
