"""Tables: rows by number, whole or divided over tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dist_llm.layers.region import WHOLE, TensorRegion
from dist_llm.planning.shards import vocab_range

__all__ = ["Embedding", "VocabParallelEmbedding"]


class Embedding(nn.Module):
    """Rows of a table that every rank holds, in the dtype asked for."""

    def __init__(self, num_rows: int, dim: int, *, region: TensorRegion = WHOLE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, dim))
        self.region = region

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """ids: (...) int64, of this rank's tokens -> (..., dim)."""
        # Look up first, cast after: only the rows used are cast.
        return F.embedding(ids, self.region.shared(self.weight)).to(dtype)


class VocabParallelEmbedding(nn.Module):
    """Rows of a table that is divided by rows: a rank looks up those it holds, and the sum over ranks is the answer."""

    def __init__(self, num_rows: int, dim: int, *, region: TensorRegion = WHOLE) -> None:
        super().__init__()
        self.start, self.stop = vocab_range(num_rows, region.tp.size, region.tp.rank)
        self.weight = nn.Parameter(torch.empty(self.stop - self.start, dim))
        self.region = region

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """ids: (B, T) int64 -> (B, T or T/tp, dim)."""
        if self.region.tp.size == 1:
            return F.embedding(ids, self.weight).to(dtype)
        elsewhere = (ids < self.start) | (ids >= self.stop)
        rows = F.embedding((ids - self.start).masked_fill(elsewhere, 0), self.weight).to(dtype)
        # One summand of each sum is a row and the others are zero, so the sum is exact in any dtype.
        return self.region.leave(rows.masked_fill(elsewhere[..., None], 0.0))
