"""Dropout, alone and with the residual addition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_llm.kernels.dropout import ADD_IMPLS, IMPLS
from tests.kernels.case import Case, Sample


@dataclass(frozen=True)
class Size:
    """Shape of x (B, T, D), probability, and first feature."""

    shape: tuple[int, int, int]
    p: float = 0.3
    feature_start: int = 0


SIZES = {
    "odd": Size((5, 123, 123)),
    "odd, inside a counter": Size((3, 23, 123), 0.1, feature_start=131),
    "one element": Size((2, 7, 1), 0.5, feature_start=2),
    "one token": Size((1, 1, 40), 0.9),
    "no token": Size((2, 0, 16)),
    "a word of the mask more": Size((1, 3, 1055), 0.2, feature_start=3),
    "wide": Size((2, 2, 2080), 0.5, feature_start=4),
    "almost all": Size((2, 3, 64), 1 - 2.0**-20),
}
GPU_SIZES = {"rows of a model": Size((4, 300, 4096), 0.1)}


def draw(size: Size, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    xs = [torch.randn(size.shape, generator=generator).to(dtype) for _ in range(2)]
    # Numbers that need more than 32 bits, and columns in no order.
    samples = torch.arange(2**33 - 1, 2**33 - 1 + size.shape[0])
    columns = torch.randperm(size.shape[1], generator=generator) + 2**32 - 200
    return xs, {"seed": 3, "site": 2**62 + 1, "samples": samples, "columns": columns, "feature_start": size.feature_start}


def make(size: Size, dtype: torch.dtype) -> Sample:
    (x, _), place = draw(size, dtype)
    return Sample((x, size.p), place, wanted=(0,))


def make_add(size: Size, dtype: torch.dtype) -> Sample:
    xs, place = draw(size, dtype)
    return Sample((*xs, size.p), place, wanted=(0, 1))


def checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    xs, mask = [x.requires_grad_() for x in draw(Size((2, 3, 8)), dtype)[0]], (0.25, 123, 2**32 - 1, torch.arange(2), torch.arange(3), 4)
    return [(torch.ops.dist_llm.dropout, (xs[0], *mask))]


def checks_add(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    xs, mask = [x.requires_grad_() for x in draw(Size((2, 3, 8)), dtype)[0]], (0.25, 123, 2**32 - 1, torch.arange(2), torch.arange(3), 4)
    return [(torch.ops.dist_llm.dropout_add, (*xs, *mask))]


CASES = [
    Case("dropout", IMPLS, SIZES, make, checks, gpu_sizes=GPU_SIZES),
    Case("dropout_add", ADD_IMPLS, SIZES, make_add, checks_add, gpu_sizes=GPU_SIZES),
]
