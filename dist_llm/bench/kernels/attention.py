"""``bench attention``: causal, every token sees all before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dist_llm.bench.kernels.case import Race, raced
from dist_llm.kernels.attention import IMPLS

__all__ = ["attention_flops", "qkv", "races"]


def qkv(shape: tuple[int, int, int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries, keys and values (B, T, N, H) in bf16."""
    q, k, v = (torch.randn(shape, device=device).bfloat16() for _ in range(3))
    return q, k, v


def attention_flops(shape: tuple[int, int, int, int], visible_pairs: int) -> int:
    """Of forward (two products) and backward (five) over the pairs of one row that see each other."""
    rows, _, heads, head_dim = shape
    return 7 * 2 * rows * heads * head_dim * visible_pairs


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's fused attention, in our layout."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def races(device: torch.device, *, tiny: bool = False) -> list[Race]:
    """bf16, forward and backward; the first is the standard shape."""
    ours, reference = raced(IMPLS, device, torch.bfloat16).fn, IMPLS[-1].fn
    shapes = [(2, 1024, 12, 64), (12, 256, 6, 64)] if device.type == "cpu" else [(4, 4096, 16, 128), (8, 2048, 16, 64)]
    if tiny:
        shapes = [(2, 33, 2, 64)]
    return [
        Race(
            title="causal attention bf16 B {} S {} H {} D {}".format(*shape),
            args=qkv(shape, device),
            wanted=(0, 1, 2),
            reference=lambda q, k, v: reference(q, k, v, causal=True),
            ours=lambda q, k, v: ours(q, k, v, causal=True),
            eager=eager,
            flops=attention_flops(shape, shape[1] * (shape[1] + 1) // 2),
            goal=4.0 if shape == shapes[0] else None,
        )
        for shape in shapes
    ]
