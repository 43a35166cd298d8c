"""Linear layers, several side by side, and the gradient of their weights by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import torch

from dist_llm.kernels.linear import IMPLS, JOINT_IMPLS, WEIGHT_GRAD_IMPLS
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

# rows, inputs, outputs: rows of more than one block of 1024, inputs of more than one of 384, outputs of more than one of 2048
WEIGHT_GRAD_SIZES = {
    "odd": (123, 123, 7),
    "one row": (1, 64, 96),
    "one of each": (1, 1, 1),
    "no row": (0, 8, 4),
    "no input": (3, 0, 4),
    "no output": (3, 8, 0),
    "a block and a row": (1025, 40, 33),
    "blocks of rows": (2061, 97, 50),
    "blocks of inputs": (70, 803, 31),
    "blocks of everything": (1100, 390, 2055),
}


def make(size: tuple[tuple[int, ...], int, int, bool], dtype: torch.dtype) -> Sample:
    rows, inputs, outputs, has_bias = size
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((*rows, inputs), generator=generator).to(dtype)
    weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype) if has_bias else None
    return Sample((x, weight, bias), wanted=(0, 1, 2) if has_bias else (0, 1))


def make_weight_grad(size: tuple[int, int, int], dtype: torch.dtype) -> Sample:
    rows, inputs, outputs = size
    generator = torch.Generator().manual_seed(4)
    dy = torch.randn(rows, outputs, generator=generator).to(dtype)
    return Sample((dy, torch.randn(rows, inputs, generator=generator).to(dtype)), wanted=())


def separate(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A joint product of three layers with each tensor an argument of its own, so that gradients can be asked for by position."""

    @wraps(fn)
    def of_tensors(x: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
        return fn(x, tensors[:3], tensors[3:])

    return of_tensors


def make_joint(size: tuple[tuple[int, ...], int, int, bool], dtype: torch.dtype) -> Sample:
    x, weight, bias = make(size, dtype).args
    outputs = weight.shape[0]
    weights = [weight, weight[: outputs // 2 + 1].flip(0).clone(), weight[:1].clone()]
    biases = [None if bias is None else bias[: w.shape[0]].clone() for w in weights]
    return Sample((x, *weights, *biases), wanted=tuple(range(7)) if bias is not None else tuple(range(4)))


def checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    # The product is torch's own op; there is none of ours to check.
    del dtype
    return []


def weight_grad_checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    if dtype != torch.bfloat16:
        return []
    return [(torch.ops.dist_llm.linear_weight_grad.default, make_weight_grad((5, 33, 9), dtype).args)]


CASES = [
    Case("linear", IMPLS, SIZES, make, checks),
    Case("joint_linear", tuple(replace(impl, fn=separate(impl.fn)) for impl in JOINT_IMPLS), SIZES, make_joint, checks),
    Case("linear_weight_grad", WEIGHT_GRAD_IMPLS, WEIGHT_GRAD_SIZES, make_weight_grad, weight_grad_checks),
]
