"""RMSNorm and LayerNorm over the last dimension, fp32 inside."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from dist_llm.layers.region import WHOLE, TensorRegion

__all__ = ["LayerNorm", "RMSNorm", "RMSNormFn"]

RMSNormFn = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, dim: int, *, eps: float, fn: RMSNormFn, region: TensorRegion = WHOLE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.fn = fn
        self.region = region

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., dim) -> (..., dim), dtype of x."""
        return self.fn(x, self.region.shared(self.weight).to(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al., arXiv:1607.06450)."""

    def __init__(self, dim: int, *, eps: float, bias: bool, region: TensorRegion = WHOLE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.eps = eps
        self.region = region

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., dim) -> (..., dim), dtype of x."""
        # torch's kernel keeps mean and variance in fp32 for bf16 input.
        bias = None if self.bias is None else self.region.shared(self.bias).to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.region.shared(self.weight).to(x.dtype), bias, self.eps)
