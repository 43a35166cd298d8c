"""Rotary position embedding in plain PyTorch: the definition (Su et al., arXiv:2104.09864), in the layout of halves, as in LLaMA."""

from __future__ import annotations

import torch

__all__ = ["check_rotary", "rotary_reference"]


def rotary_reference(x_BTNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + H/2) of each head, in fp32 and rounded once.

    Args:
        x_BTNH: (B, T, N, H) queries or keys, fp32 or bf16, H even. fp64 is computed in fp64: tests measure errors against it.
        cos: (B, T, 1, H/2) float32, the cosine of the angle of each position and pair; B and T may be 1, and hold for all then.
        sin: like cos.

    Returns:
        (B, T, N, H), dtype of x.

    Raises:
        ValueError: a shape is wrong.
    """
    check_rotary(x_BTNH, cos, sin)
    first, second = x_BTNH.to(torch.promote_types(x_BTNH.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTNH.dtype)


def check_rotary(x_BTNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Check shapes.

    Raises:
        ValueError: H is odd, or a table does not fit.
    """
    if x_BTNH.dim() != 4 or x_BTNH.shape[-1] % 2 != 0 or x_BTNH.shape[-1] == 0:
        raise ValueError(f"rotary needs x (B, T, N, H) with H even, it is {tuple(x_BTNH.shape)}")
    batch, tokens, _, head_dim = x_BTNH.shape
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() == 4 and table.shape[0] in (1, batch) and table.shape[1] in (1, tokens)
        if not fits or table.shape[2:] != (1, head_dim // 2):
            raise ValueError(f"{name} {tuple(table.shape)} must be (B, T, 1, H/2) for x (B, T, N, H) {tuple(x_BTNH.shape)}")
