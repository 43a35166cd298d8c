"""Tables: rows by number, whole or divided over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dist_llm.kernels.embedding.reference import embedding_reference
from dist_llm.layers.region import WHOLE, TensorRegion
from dist_llm.planning.shards import vocab_range

__all__ = ["Embedding", "EmbeddingFn", "VocabParallelEmbedding"]

EmbeddingFn = Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]


class Embedding(nn.Module):
    """Rows of a table that every rank holds, in the dtype asked for."""

    def __init__(self, num_rows: int, dim: int, *, fn: EmbeddingFn = embedding_reference, region: TensorRegion = WHOLE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, dim))
        self.fn = fn
        self.region = region

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """ids: (...) int64, of this rank's tokens -> (..., dim)."""
        return self.fn(ids, self.region.shared(self.weight), dtype)


class VocabParallelEmbedding(nn.Module):
    """Rows of a table that is divided by rows: a rank looks up those it holds, and the sum over ranks is the answer."""

    def __init__(self, num_rows: int, dim: int, *, fn: EmbeddingFn = embedding_reference, region: TensorRegion = WHOLE) -> None:
        super().__init__()
        self.start, self.stop = vocab_range(num_rows, region.tp.size, region.tp.rank)
        self.weight = nn.Parameter(torch.empty(self.stop - self.start, dim))
        self.fn = fn
        self.region = region

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """ids: (B, T) int64 -> (B, T or T/tp, dim)."""
        if self.region.tp.size == 1:
            return self.fn(ids, self.weight, dtype)
        elsewhere = (ids < self.start) | (ids >= self.stop)
        rows = self.fn((ids - self.start).masked_fill(elsewhere, 0), self.weight, dtype)
        # One summand of each sum is a row and the others are zero, so the sum is exact in any dtype.
        return self.region.leave(rows.masked_fill(elsewhere[..., None], 0.0))
