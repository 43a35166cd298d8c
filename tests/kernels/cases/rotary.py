"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dist_llm.kernels.rotary import IMPLS
from tests.kernels.case import Case, Sample

SIZES = {  # B, T, N, H
    "odd": (5, 23, 3, 34),
    "head dim 40": (3, 7, 2, 40),
    "head dim 64": (2, 9, 6, 64),
    "head dim 128": (1, 5, 2, 128),
    "one pair": (2, 3, 1, 2),
    "one token": (1, 1, 4, 16),
    "no token": (2, 0, 4, 16),
    "a head in two pieces": (1, 2, 2, 1500),
}
GPU_SIZES = {"a model": (2, 300, 32, 128)}


def draw(size: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    batch, tokens, _, head_dim = size
    angles = 6.3 * torch.rand(batch, tokens, 1, head_dim // 2, generator=generator)
    return torch.randn(size, generator=generator).to(dtype), angles.cos(), angles.sin()


def make(size: tuple[int, ...], dtype: torch.dtype) -> Sample:
    return Sample(draw(size, dtype), wanted=(0,))


def checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    x, cos, sin = draw((2, 3, 2, 8), dtype)
    return [(torch.ops.dist_llm.rotary, (x.requires_grad_(), cos, sin, inverse)) for inverse in (False, True)]


CASES = [Case("rotary", IMPLS, SIZES, make, checks, gpu_sizes=GPU_SIZES)]
