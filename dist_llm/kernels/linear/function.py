"""The autograd function of a linear layer whose products are somebody's own: forward one product, backward two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

__all__ = ["LinearProduct", "Product", "WeightGrad"]

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
WeightGrad = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class LinearProduct(torch.autograd.Function):
    """X A^T + b for the A and b of one layer, or of several side by side.

    Keeps the weights where they are: the copy of them side by side is made again for backward, not kept till then.
    """

    @staticmethod
    def forward(
        ctx: Any, product: Product, weight_grad: WeightGrad, x: torch.Tensor, num_layers: int, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        """``tensors`` are the weights of the layers, then their biases or a None each."""
        weights, biases = tensors[:num_layers], tensors[num_layers:]
        ctx.save_for_backward(x, *weights)
        ctx.weight_grad, ctx.has_bias = weight_grad, biases[0] is not None
        return product(x, side_by_side(weights), side_by_side(biases) if ctx.has_bias else None)  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of x, of each weight and of each bias: views of one tensor where there are several layers."""
        x, *weights = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        sizes = [weight.shape[0] for weight in weights]
        dx = torch.mm(rows, side_by_side(weights)).view(x.shape) if ctx.needs_input_grad[2] else None
        dweights: Sequence[torch.Tensor | None] = [None] * len(weights)
        dbiases: Sequence[torch.Tensor | None] = [None] * len(weights)
        if any(ctx.needs_input_grad[4 : 4 + len(weights)]):
            dweight, dbias = ctx.weight_grad(rows, x.reshape(-1, x.shape[-1]))
            dweights = torch.split(dweight, sizes)
            if ctx.has_bias:
                dbiases = torch.split(dbias, sizes)
        elif ctx.has_bias and any(ctx.needs_input_grad[4 + len(weights) :]):
            dbiases = torch.split(rows.sum(0), sizes)
        return None, None, dx, None, *dweights, *dbiases


def side_by_side(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensors as one, without a copy where there is one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))
