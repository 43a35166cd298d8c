"""RMSNorm and LayerNorm over the last dimension, alone and behind the addition to the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dist_llm.kernels.layer_norm.reference import layer_norm_reference, layer_norm_residual_reference
from dist_llm.kernels.rms_norm.reference import rms_norm_reference, rms_norm_residual_reference
from dist_llm.layers.region import WHOLE, TensorRegion

__all__ = ["LayerNorm", "LayerNormFn", "LayerNormResidualFn", "RMSNorm", "RMSNormFn", "RMSNormResidualFn"]

Pair = tuple[torch.Tensor, torch.Tensor]
RMSNormFn = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
RMSNormResidualFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], Pair]
LayerNormFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]
LayerNormResidualFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], Pair]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(
        self,
        dim: int,
        *,
        eps: float,
        fn: RMSNormFn = rms_norm_reference,
        residual_fn: RMSNormResidualFn = rms_norm_residual_reference,
        region: TensorRegion = WHOLE,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.fn = fn
        self.residual_fn = residual_fn
        self.region = region

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor | Pair:
        """The norm of x: (..., dim) -> (..., dim), dtype of x; with ``residual``, the norm of ``x + residual`` and that sum."""
        weight = self.region.shared(self.weight).to(x.dtype)
        return self.fn(x, weight, self.eps) if residual is None else self.residual_fn(x, residual, weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al., arXiv:1607.06450)."""

    def __init__(
        self,
        dim: int,
        *,
        eps: float,
        bias: bool,
        fn: LayerNormFn = layer_norm_reference,
        residual_fn: LayerNormResidualFn = layer_norm_residual_reference,
        region: TensorRegion = WHOLE,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.eps = eps
        self.fn = fn
        self.residual_fn = residual_fn
        self.region = region

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor | Pair:
        """The norm of x: (..., dim) -> (..., dim), dtype of x; with ``residual``, the norm of ``x + residual`` and that sum."""
        weight = self.region.shared(self.weight).to(x.dtype)
        bias = None if self.bias is None else self.region.shared(self.bias).to(x.dtype)
        if residual is None:
            return self.fn(x, weight, bias, self.eps)
        return self.residual_fn(x, residual, weight, bias, self.eps)
