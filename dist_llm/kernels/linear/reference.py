"""Y = X A^T + b in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["linear_reference"]


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
