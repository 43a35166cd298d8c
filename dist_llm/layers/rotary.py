"""Rotary position embedding (Su et al., arXiv:2104.09864), halves layout as in LLaMA.

Element i of a head is paired with element i + H/2; the pair is turned by position * theta^(-2i/H).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["RotaryFn", "rotary_table"]

RotaryFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def rotary_table(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine for each position, computed once a forward pass and shared by all layers.

    Args:
        positions: (B, T) int64.
        head_dim: H, even.
        theta: base of the frequencies.

    Returns:
        two tensors (B, T, 1, H/2), float32.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.to(torch.float64)[..., None, None] * theta**-exponents  # float64: positions reach millions
    return angles.cos().float(), angles.sin().float()
