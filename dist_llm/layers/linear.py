"""Linear layers whose weights are cast to the dtype of the computation where they are used.

The weights may be fp32 masters (plain engine, ZeRO-0) or already bf16 (ZeRO-1 to 3): the arithmetic is the same either way,
since a bf16 weight is the rounded master. With fp32 masters the gradient of the cast arrives, and is accumulated, in fp32.

Y = X A with A divided by columns needs nothing but this rank's outputs (``Linear`` with fewer of them); divided by rows, the
ranks' products are summed (Shoeybi et al., arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dist_llm.comm.autograd import copy_to_group
from dist_llm.comm.context import SINGLE, Group
from dist_llm.kernels.linear.reference import joint_linear_reference, linear_reference
from dist_llm.layers.region import WHOLE, TensorRegion

__all__ = ["ActivationFn", "JointLinearFn", "Linear", "LinearFn", "RowParallelLinear", "joint_linear"]

ActivationFn = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
LinearFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
JointLinearFn = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor | None]], torch.Tensor]


class Linear(nn.Module):
    """Y = X A^T + b in the dtype of X. Weights are filled later, by logical name.

    Args:
        in_features: of X.
        out_features: on this rank.
        bias: add b.
        copies: ranks that hold the same weights and use them for different heads; their gradients are summed.
        fn: product and bias (``kernels.linear``).
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, copies: Group = SINGLE, fn: LinearFn = linear_reference) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.copies = copies
        self.fn = fn

    def forward(self, x: torch.Tensor, activation: ActivationFn | None = None) -> torch.Tensor:
        """x: (..., in_features) -> (..., out_features), dtype of x; ``activation`` takes X A^T and b, and adds them itself."""
        weight, bias = self.tensors(x.dtype)
        return self.fn(x, weight, bias) if activation is None else activation(self.fn(x, weight, None), bias)

    def tensors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias as the product takes them."""
        return self._whole(self.weight).to(dtype), None if self.bias is None else self._whole(self.bias).to(dtype)

    def _whole(self, parameter: torch.Tensor) -> torch.Tensor:
        return copy_to_group(parameter.float(), self.copies) if self.copies.size > 1 else parameter


def joint_linear(layers: Sequence[Linear], x: torch.Tensor, fn: JointLinearFn = joint_linear_reference) -> tuple[torch.Tensor, ...]:
    """The outputs of layers that share their input, in training by one product.

    The layers themselves are not called: not for ZeRO-3, which fills a weight only while its own layer runs.

    Args:
        layers: all with a bias, or all without.
        x: (..., in_features).
        fn: product of several weights (``kernels.linear``).

    Returns:
        (..., out_features) of each, dtype of x; strided views of one tensor where one product made them.
    """
    # Putting the weights side by side is a copy of them, which the few tokens of a step of generation would not pay back.
    if not torch.is_grad_enabled():
        return tuple(layer(x) for layer in layers)
    weights, biases = zip(*(layer.tensors(x.dtype) for layer in layers), strict=True)
    return torch.split(fn(x, weights, biases), [layer.weight.shape[0] for layer in layers], dim=-1)


class RowParallelLinear(nn.Module):
    """Y = sum over ranks of X_rank A_rank^T, + b once; X has this rank's share of the input features."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, region: TensorRegion = WHOLE, fn: LinearFn = linear_reference
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.region = region
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, in_features of this rank) -> (B, T or T/tp, out_features), dtype of x."""
        weight = self.weight.to(x.dtype)
        if self.region.tp.size == 1:
            return self.fn(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        y = self.region.leave(self.fn(x, weight, None))
        return y if self.bias is None else y + self.region.shared(self.bias).to(x.dtype)
