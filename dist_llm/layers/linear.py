"""Linear layer and embedding whose weights are cast to the dtype of the computation where they are used.

The weights may be fp32 masters (plain engine, ZeRO-0) or already bf16 (ZeRO-1 to 3): the arithmetic is the same either way,
since a bf16 weight is the rounded master. With fp32 masters the gradient of the cast arrives, and is accumulated, in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Embedding", "Linear"]


class Linear(nn.Module):
    """Y = X A^T + b in the dtype of X. Weights are filled later, by logical name."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) -> (..., out_features), dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Module):
    """Rows of a table, in the dtype asked for."""

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, dim))

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """ids: (...) int64 -> (..., dim)."""
        # Look up first, cast after: only the rows used are cast.
        return F.embedding(ids, self.weight).to(dtype)
