"""Position-wise MLP: gelu, or swiglu with a gate (Shazeer, arXiv:2002.05202).

Divided over tensor-parallel ranks by hidden features: each rank computes its part of them, and ``down`` sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dist_llm.kernels.activation.reference import gelu_reference, swiglu_reference
from dist_llm.kernels.linear.reference import linear_reference
from dist_llm.layers.linear import ActivationFn, Linear, LinearFn, RowParallelLinear
from dist_llm.layers.region import WHOLE, TensorRegion

__all__ = ["GeluMLP", "SwigluFn", "SwigluMLP"]

SwigluFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class GeluMLP(nn.Module):
    """down(gelu(up(x))); the tanh form of gelu, as GPT-2 has it. The bias of ``up`` is added inside gelu."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        bias: bool,
        linear: LinearFn = linear_reference,
        gelu: ActivationFn = gelu_reference,
        region: TensorRegion = WHOLE,
    ) -> None:
        super().__init__()
        self.gelu = gelu
        self.region = region
        hidden //= region.tp.size
        self.up = Linear(dim, hidden, bias=bias, fn=linear)
        self.down = RowParallelLinear(hidden, dim, bias=bias, region=region, fn=linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, dim) of the residual stream -> the same shape."""
        hidden: torch.Tensor = self.up(self.region.enter(x), self.gelu)
        return self.down(hidden)


class SwigluMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        bias: bool,
        linear: LinearFn = linear_reference,
        swiglu: SwigluFn = swiglu_reference,
        region: TensorRegion = WHOLE,
    ) -> None:
        super().__init__()
        self.swiglu = swiglu
        self.region = region
        hidden //= region.tp.size
        self.gate = Linear(dim, hidden, bias=bias, fn=linear)
        self.up = Linear(dim, hidden, bias=bias, fn=linear)
        self.down = RowParallelLinear(hidden, dim, bias=bias, region=region, fn=linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, dim) of the residual stream -> the same shape."""
        x = self.region.enter(x)
        return self.down(self.swiglu(self.gate(x), self.up(x)))
