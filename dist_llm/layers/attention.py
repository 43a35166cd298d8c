"""Self-attention: projections, rotary positions, key-value cache, and whichever attention op it is given.

Divided over tensor-parallel ranks by heads. With fewer key-value heads than ranks, neighbours hold copies of one.

B batch, T new tokens, S tokens seen, N query heads, K key and value heads (both of this rank), H head dim, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_llm.kernels.linear.reference import joint_linear_reference, linear_reference
from dist_llm.kernels.rotary.reference import rotary_reference
from dist_llm.layers.linear import JointLinearFn, Linear, LinearFn, RowParallelLinear, joint_linear
from dist_llm.layers.region import WHOLE, TensorRegion
from dist_llm.layers.rotary import RotaryFn

__all__ = ["AttentionFn", "KeyValueCache", "SelfAttention"]

AttentionFn = Callable[..., torch.Tensor]


@dataclass
class KeyValueCache:
    """Keys and values one layer has seen, written in place.

    keys, values: (B, capacity, K, H); the first ``length`` tokens are filled.
    """

    keys: torch.Tensor
    values: torch.Tensor
    length: int = 0

    def append(self, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T more tokens; return all seen so far, (B, S, K, H) each."""
        stop = self.length + k_BTKH.shape[1]
        assert stop <= self.keys.shape[1], f"cache of {self.keys.shape[1]} tokens asked to hold {stop}"
        self.keys[:, self.length : stop] = k_BTKH
        self.values[:, self.length : stop] = v_BTKH
        self.length = stop
        return self.keys[:, :stop], self.values[:, :stop]

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep batch rows ``rows`` (B,), in that order: beam search moves hypotheses."""
        self.keys = self.keys.index_select(0, rows)
        self.values = self.values.index_select(0, rows)


class SelfAttention(nn.Module):
    """Causal self-attention with num_kv_heads <= num_heads (multi-head, grouped-query, multi-query).

    Args:
        dim: width of the residual stream.
        num_heads: of queries, over all ranks.
        num_kv_heads: of keys and values.
        head_dim: of each head.
        bias: on all four projections.
        fn: attention (``kernels.attention``).
        linear: product and bias (``kernels.linear``).
        rotate: rotary positions (``kernels.rotary``).
        scale: multiplies query times key; default 1 / sqrt(head_dim).
        region: tensor-parallel ranks.
        recompute: keep only queries, keys and values for backward.
        window: a token sees that many, itself the last of them; None: all before it.
        joint: computes queries, keys and values by one product; None: each by its own.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        fn: AttentionFn,
        linear: LinearFn = linear_reference,
        rotate: RotaryFn = rotary_reference,
        scale: float | None = None,
        region: TensorRegion = WHOLE,
        recompute: bool = False,
        window: int | None = None,
        joint: JointLinearFn | None = joint_linear_reference,
    ) -> None:
        super().__init__()
        self.joint = joint
        self.head_dim = head_dim
        self.window = window
        self.scale = head_dim**-0.5 if scale is None else scale
        self.region = region
        self.recompute = recompute
        tp = region.tp.size
        kv_dim = max(1, num_kv_heads // tp) * head_dim
        self.query = Linear(dim, num_heads // tp * head_dim, bias=bias, fn=linear)
        self.key = Linear(dim, kv_dim, bias=bias, copies=region.kv, fn=linear)
        self.value = Linear(dim, kv_dim, bias=bias, copies=region.kv, fn=linear)
        self.output = RowParallelLinear(num_heads // tp * head_dim, dim, bias=bias, region=region, fn=linear)
        self.fn = fn
        self.rotate = rotate

    def forward(
        self,
        x_BTD: torch.Tensor,
        *,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        doc_ids: torch.Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x_BTD: (B, T or, under sequence parallelism, T/tp, D).
            rotary: cosine and sine of the T positions, or None with learned positions.
            doc_ids: (B, T) int32; attention stays inside equal ids. None: one text a row.
            cache: keys and values of earlier tokens; grows by T.

        Returns:
            the shape of x_BTD.
        """
        x_BTD = self.region.enter(x_BTD)
        projections = (self.query, self.key, self.value)
        projected = joint_linear(projections, x_BTD, self.joint) if self.joint else [layer(x_BTD) for layer in projections]
        q_BTNH, k_BTKH, v_BTKH = (t.view(*t.shape[:-1], -1, self.head_dim) for t in projected)
        if self.recompute and cache is None and torch.is_grad_enabled():
            # Of everything between the projections only q, k and v are kept (arXiv:2205.05198, section 5).
            out_BTNH = checkpoint(
                self._attend, q_BTNH, k_BTKH, v_BTKH, rotary, doc_ids, None, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out_BTNH = self._attend(q_BTNH, k_BTKH, v_BTKH, rotary, doc_ids, cache)
        return self.output(out_BTNH.flatten(-2))

    def _attend(
        self,
        q_BTNH: torch.Tensor,
        k_BTKH: torch.Tensor,
        v_BTKH: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        doc_ids: torch.Tensor | None,
        cache: KeyValueCache | None,
    ) -> torch.Tensor:
        if rotary is not None:
            q_BTNH = self.rotate(q_BTNH, *rotary)
            k_BTKH = self.rotate(k_BTKH, *rotary)
            # A view of the joint projection would keep queries and keys from before the rotation alive with it.
            v_BTKH = v_BTKH.contiguous()
        if cache is not None:
            k_BTKH, v_BTKH = cache.append(k_BTKH, v_BTKH)
        options = {} if self.window is None else {"window": self.window}  # ring attention knows none
        return self.fn(q_BTNH, k_BTKH, v_BTKH, causal=True, doc_ids=doc_ids, scale=self.scale, **options)
