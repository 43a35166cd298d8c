"""Gelu and swiglu, with and without biases and dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_llm.kernels.activation import GELU_IMPLS, SWIGLU_IMPLS
from dist_llm.kernels.activation.native import NOTHING_DROPPED
from tests.kernels.case import Case, Sample


@dataclass(frozen=True)
class Size:
    """Shape of x, what comes before and behind the function, and how large its arguments are."""

    shape: tuple[int, ...]
    bias: str = "none"
    p: float = 0.0
    feature_start: int = 0
    scale: float = 1.0


SIZES = {
    "odd": Size((5, 123, 123)),
    "odd, biases": Size((5, 123, 123), bias="like x"),
    "odd, fp32 biases": Size((5, 123, 123), bias="fp32"),
    "odd, dropout": Size((5, 23, 123), p=0.3),
    "odd, all": Size((3, 23, 123), bias="like x", p=0.1, feature_start=6),
    "head dim 40": Size((3, 40), bias="like x"),
    "one element": Size((7, 1), bias="like x"),
    "one row": Size((40,)),
    "no row": Size((0, 16), bias="like x"),
    "many rows": Size((300, 57), bias="fp32"),
    "wide": Size((1, 2, 2081), bias="like x", p=0.5, feature_start=128),
    "large arguments": Size((9, 129), scale=1e4),
    "large arguments, all": Size((3, 2, 72), bias="like x", p=0.2, scale=1e4),
}
GPU_SIZES = {"rows of a model": Size((1200, 4096)), "all of it": Size((4, 300, 4096), bias="like x", p=0.1)}


def draw(size: Size, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor | None], dict[str, Any]]:
    """Two of x, two biases, and the arguments of dropout."""
    generator = torch.Generator().manual_seed(7)
    scale = min(size.scale, 50.0) if dtype == torch.float16 else size.scale  # a product of two must fit into fp16
    xs = [(scale * torch.randn(size.shape, generator=generator)).to(dtype) for _ in range(2)]
    biases = [
        None
        if size.bias == "none"
        else torch.randn(size.shape[-1], generator=generator).to(torch.float32 if size.bias == "fp32" else dtype)
        for _ in range(2)
    ]
    if size.p == 0.0:
        return xs, biases, {}
    samples, columns = torch.arange(2**33 - 1, 2**33 - 1 + size.shape[0]), torch.arange(7, 7 + size.shape[1])
    dropout = {"p": size.p, "seed": 3, "site": 2**62 + 1, "samples": samples, "columns": columns, "feature_start": size.feature_start}
    return xs, biases, dropout


def sums(size: Size, *indices: int) -> dict[int, float]:
    """Sums over rows are of about as many terms of size 1."""
    return {i: size.scale * math.prod(size.shape[:-1]) for i in indices} if size.bias != "none" else {}


def make_gelu(size: Size, dtype: torch.dtype) -> Sample:
    (x, _), (bias, _), dropout = draw(size, dtype)
    return Sample((x, bias), dropout, wanted=(0,) if bias is None else (0, 1), scales=sums(size, 2))


def make_swiglu(size: Size, dtype: torch.dtype) -> Sample:
    xs, biases, dropout = draw(size, dtype)
    return Sample((*xs, *biases), dropout, wanted=(0, 1) if biases[0] is None else (0, 1, 2, 3), scales=sums(size, 3, 4))


def checks_gelu(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    x, dy, bias, mask = check_arguments(dtype)
    ops = torch.ops.dist_llm
    return [
        (ops.gelu, (x.clone().requires_grad_(), bias.clone().requires_grad_(), *mask)),
        (ops.gelu, (x.clone().requires_grad_(), None, *NOTHING_DROPPED)),
        (ops.gelu_backward, (dy, x, bias, *mask)),
        (ops.gelu_backward, (dy, x, None, *NOTHING_DROPPED)),
    ]


def checks_swiglu(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    x, dy, bias, mask = check_arguments(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, dy, bias, bias)]
    ops = torch.ops.dist_llm
    return [
        (ops.swiglu, (*leaves, *mask)),
        (ops.swiglu, (*leaves[:2], None, None, *NOTHING_DROPPED)),
        (ops.swiglu_backward, (dy, x, dy.clone(), bias, bias.clone(), *mask)),
        (ops.swiglu_backward, (dy, x, dy.clone(), None, None, *NOTHING_DROPPED)),
    ]


def check_arguments(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[Any, ...]]:
    (x, dy), (bias, _), _ = draw(Size((2, 3, 8), bias="like x"), dtype)
    assert bias is not None
    return x, dy, bias, (0.25, 123, 2**32 - 1, torch.arange(2), torch.arange(3), 4)


CASES = [
    Case("gelu", GELU_IMPLS, SIZES, make_gelu, checks_gelu, gpu_sizes=GPU_SIZES),
    Case("swiglu", SWIGLU_IMPLS, SIZES, make_swiglu, checks_swiglu, gpu_sizes=GPU_SIZES),
]
