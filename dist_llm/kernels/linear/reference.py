"""Y = X A^T + b in plain PyTorch: the definitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dist_llm.kernels.linear.function import LinearProduct

__all__ = ["joint_linear_reference", "linear_reference", "weight_grad_reference"]


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch's own product, which accumulates in fp32.

    Args:
        x: (..., K).
        weight: (N, K), dtype of x.
        bias: (N,), dtype of x, or None.

    Returns:
        (..., N), dtype of x.
    """
    return F.linear(x, weight, bias)


def joint_linear_reference(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Several layers of one input by one product: better shapes, and one gradient of x instead of a sum.

    Args:
        x: (..., K).
        weights: (N_i, K) each, dtype of x.
        biases: (N_i,) each, dtype of x; or a None for each.

    Returns:
        (..., N_1 + N_2 + ...), dtype of x.
    """
    y: torch.Tensor = LinearProduct.apply(F.linear, weight_grad_reference, x, len(weights), *weights, *biases)  # type: ignore[no-untyped-call]
    return y


def weight_grad_reference(dy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight and bias.

    Args:
        dy: (R, N), of Y.
        x: (R, K), its dtype.

    Returns:
        (N, K) and (N,), dtype of x: dy^T x, and dy summed over the rows.
    """
    return torch.mm(dy.t(), x), dy.sum(0)
