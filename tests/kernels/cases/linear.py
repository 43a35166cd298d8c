"""Linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dist_llm.kernels.linear import IMPLS
from tests.kernels.case import Case, Sample

# rows..., inputs, outputs, bias
SIZES = {
    "odd": ((5, 123), 123, 7, True),
    "no bias": ((2, 33), 40, 65, False),
    "one token": ((1,), 64, 96, True),
    "one output": ((3, 4), 8, 1, True),
    "no row": ((0, 3), 8, 4, True),
    "a layer": ((2, 128), 384, 1152, True),
}


def make(size: tuple[tuple[int, ...], int, int, bool], dtype: torch.dtype) -> Sample:
    rows, inputs, outputs, has_bias = size
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((*rows, inputs), generator=generator).to(dtype)
    weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype) if has_bias else None
    return Sample((x, weight, bias), wanted=(0, 1, 2) if has_bias else (0, 1))


def checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    # The product is torch's own op; there is none of ours to check.
    del dtype
    return []


CASES = [Case("linear", IMPLS, SIZES, make, checks)]
