"""Linear layers whose weights are cast to the dtype of the computation where they are used.

The weights may be fp32 masters (plain engine, ZeRO-0) or already bf16 (ZeRO-1 to 3): the arithmetic is the same either way,
since a bf16 weight is the rounded master. With fp32 masters the gradient of the cast arrives, and is accumulated, in fp32.

Y = X A with A divided by columns needs nothing but this rank's outputs (``Linear`` with fewer of them); divided by rows, the
ranks' products are summed (Shoeybi et al., arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from dist_llm.comm.autograd import copy_to_group
from dist_llm.comm.context import SINGLE, Group
from dist_llm.kernels.linear.reference import linear_reference
from dist_llm.layers.region import WHOLE, TensorRegion

__all__ = ["ActivationFn", "Linear", "LinearFn", "RowParallelLinear", "joint_linear"]

ActivationFn = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
LinearFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


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


def joint_linear(layers: Sequence[Linear], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The outputs of layers that share their input, in training by one product: better shapes, and one gradient of x instead of a sum.

    The layers themselves are not called: not for ZeRO-3, which fills a weight only while its own layer runs.

    Args:
        layers: all with a bias, or all without.
        x: (..., in_features).

    Returns:
        (..., out_features) of each, dtype of x; strided views of one tensor where one product made them.
    """
    # Putting the weights side by side is a copy of them, which the few tokens of a step of generation would not pay back.
    if not torch.is_grad_enabled():
        return tuple(layer(x) for layer in layers)
    weights, biases = zip(*(layer.tensors(x.dtype) for layer in layers), strict=True)
    y = _JointLinear.apply(layers[0].fn, x, len(layers), *weights, *biases)  # type: ignore[no-untyped-call]
    return torch.split(y, [layer.weight.shape[0] for layer in layers], dim=-1)


class _JointLinear(torch.autograd.Function):
    """Keeps the weights where they are: the copy of them side by side is made again for backward, not kept till then."""

    @staticmethod
    def forward(ctx: Any, fn: LinearFn, x: torch.Tensor, num_layers: int, *tensors: torch.Tensor | None) -> torch.Tensor:
        weights, biases = tensors[:num_layers], tensors[num_layers:]
        ctx.save_for_backward(x, *weights)
        ctx.has_bias = biases[0] is not None
        return fn(x, torch.cat(weights), torch.cat(biases) if ctx.has_bias else None)  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        sizes = [weight.shape[0] for weight in weights]
        dx = torch.mm(rows, torch.cat(weights)).view(x.shape) if ctx.needs_input_grad[1] else None
        dweights: Sequence[torch.Tensor | None] = [None] * len(weights)
        if any(ctx.needs_input_grad[3 : 3 + len(weights)]):
            dweights = torch.split(torch.mm(rows.t(), x.reshape(-1, x.shape[-1])), sizes)
        dbiases: Sequence[torch.Tensor | None] = torch.split(rows.sum(0), sizes) if ctx.has_bias else [None] * len(weights)
        return None, dx, None, *dweights, *dbiases


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
