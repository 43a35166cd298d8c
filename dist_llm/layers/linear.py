"""Linear layers whose weights are cast to the dtype of the computation where they are used.

The weights may be fp32 masters (plain engine, ZeRO-0) or already bf16 (ZeRO-1 to 3): the arithmetic is the same either way,
since a bf16 weight is the rounded master. With fp32 masters the gradient of the cast arrives, and is accumulated, in fp32.

Y = X A with A divided by columns needs nothing but this rank's outputs (``Linear`` with fewer of them); divided by rows, the
ranks' products are summed (Shoeybi et al., arXiv:1909.08053, section 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dist_llm.comm.autograd import copy_to_group
from dist_llm.comm.context import SINGLE, Group
from dist_llm.layers.region import WHOLE, TensorRegion

__all__ = ["Linear", "RowParallelLinear"]


class Linear(nn.Module):
    """Y = X A^T + b in the dtype of X. Weights are filled later, by logical name.

    Args:
        in_features: of X.
        out_features: on this rank.
        bias: add b.
        copies: ranks that hold the same weights and use them for different heads; their gradients are summed.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, copies: Group = SINGLE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.copies = copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) -> (..., out_features), dtype of x."""
        bias = None if self.bias is None else self._whole(self.bias).to(x.dtype)
        return F.linear(x, self._whole(self.weight).to(x.dtype), bias)

    def _whole(self, parameter: torch.Tensor) -> torch.Tensor:
        return copy_to_group(parameter.float(), self.copies) if self.copies.size > 1 else parameter


class RowParallelLinear(nn.Module):
    """Y = sum over ranks of X_rank A_rank^T, + b once; X has this rank's share of the input features."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, region: TensorRegion = WHOLE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.region = region

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, in_features of this rank) -> (B, T or T/tp, out_features), dtype of x."""
        weight = self.weight.to(x.dtype)
        if self.region.tp.size == 1:
            return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        y = self.region.leave(F.linear(x, weight))
        return y if self.bias is None else y + self.region.shared(self.bias).to(x.dtype)
