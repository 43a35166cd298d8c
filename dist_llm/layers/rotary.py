"""Rotary position embedding (Su et al., arXiv:2104.09864), halves layout as in LLaMA.

Element i of a head is paired with element i + H/2; the pair is turned by position * theta^(-2i/H).
"""

from __future__ import annotations

import torch

__all__ = ["apply_rotary", "rotary_table"]


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


def apply_rotary(x_BTNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of each head; fp32 inside, dtype of x outside.

    Args:
        x_BTNH: (B, T, N, H) queries or keys.
        cos: (B, T, 1, H/2) float32.
        sin: (B, T, 1, H/2) float32.
    """
    first, second = x_BTNH.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTNH.dtype)
