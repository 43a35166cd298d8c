"""``bench rotary``."""

from __future__ import annotations

import torch

from dist_llm.bench.kernels.case import Race, raced
from dist_llm.kernels.rotary import IMPLS

__all__ = ["races"]


def eager(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As models write it, in fp32 inside."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def races(device: torch.device, *, tiny: bool = False) -> list[Race]:
    """bf16, forward and backward; the second time queries are a part of a fused projection."""
    batch, tokens, heads, head_dim = (2, 5, 3, 16) if tiny else (12, 256, 24, 64) if device.type == "cpu" else (8, 2048, 32, 128)
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device).bfloat16()
    angles = 6.3 * torch.rand(batch, tokens, 1, head_dim // 2, device=device)
    shape = f"bf16 {batch} x {tokens} x {heads} x {head_dim}"
    return [
        Race(
            title=title,
            args=(x, angles.cos(), angles.sin()),
            wanted=(0,),
            reference=IMPLS[-1].fn,
            ours=raced(IMPLS, device, x.dtype).fn,
            eager=eager,
            # Forward reads x and writes y, backward the same of their gradients.
            moved_bytes=4 * batch * tokens * heads * head_dim * x.element_size(),
        )
        for title, x in ((f"rotary {shape}", qkv[:, :, 0].contiguous()), (f"rotary of a part {shape}", qkv[:, :, 0]))
    ]
