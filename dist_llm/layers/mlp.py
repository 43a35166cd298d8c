"""Position-wise MLP: gelu, or swiglu with a gate (Shazeer, arXiv:2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dist_llm.layers.linear import Linear

__all__ = ["GeluMLP", "SwigluMLP"]


class GeluMLP(nn.Module):
    """down(gelu(up(x))); the tanh form of gelu, as GPT-2 has it."""

    def __init__(self, dim: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.up = Linear(dim, hidden, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., dim) -> (..., dim)."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwigluMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.gate = Linear(dim, hidden, bias=bias)
        self.up = Linear(dim, hidden, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., dim) -> (..., dim)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
