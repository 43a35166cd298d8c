"""LayerNorm with and without bias, alone and with the residual addition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_llm.kernels.layer_norm import IMPLS, RESIDUAL_IMPLS
from tests.kernels.case import Case, Sample

EPS = 1e-5


@dataclass(frozen=True)
class Size:
    """Shape of x, its mean, and what comes with it."""

    shape: tuple[int, ...]
    mean: float = 0.0
    with_bias: bool = True
    fp32_weight: bool = False


SIZES = {
    "odd": Size((5, 123, 123)),
    "head dim 40": Size((3, 40), with_bias=False),
    "one element": Size((7, 1)),
    "one row": Size((40,)),
    "no row": Size((0, 16)),
    "many rows, fp32 weight": Size((300, 257), fp32_weight=True),
    "wide": Size((6, 1024), with_bias=False),
    "wider than the first cache": Size((5, 3333), fp32_weight=True),
    "mean 1000": Size((9, 200), mean=1000.0),
}
GPU_SIZES = {"rows of a model": Size((1200, 4096)), "more than a block holds": Size((3, 40000))}


def tensors(size: Size, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    x, residual = ((torch.randn(size.shape, generator=generator) + size.mean / n).to(dtype) for n in (1, 2))
    weight, bias = (1 + 0.3 * torch.randn(2, size.shape[-1], generator=generator)).to(torch.float32 if size.fp32_weight else dtype)
    return x, residual, weight, bias if size.with_bias else None


def scales(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, inputs: int, outputs: int) -> dict[int, float]:
    """The sizes of what is subtracted in y (a mean), dx (at D = 1 of equal numbers) and dweight; arriving gradients are at most 3."""
    if x.numel() == 0:
        return {}
    x = x.double()
    rstd = (x.var(-1, keepdim=True, correction=0) + EPS).rsqrt()
    normed = (x - x.mean(-1, keepdim=True)) * rstd
    rows = x.numel() // x.shape[-1]
    w = weight.double().abs().max()
    dx = float(3 * (rstd * w).max() * (2 + normed.abs().max()) + 3)
    found = {outputs + n: dx for n in range(inputs)}
    found[outputs + inputs] = float(3 * normed.abs().max() * rows)
    if bias is not None:
        found[outputs + inputs + 1] = float(3 * rows)
    return found


def make(size: Size, dtype: torch.dtype) -> Sample:
    x, _, weight, bias = tensors(size, dtype)
    wanted = (0, 1) if bias is None else (0, 1, 2)
    return Sample((x, weight, bias, EPS), wanted=wanted, scales=scales(x, weight, bias, inputs=1, outputs=1))


def make_residual(size: Size, dtype: torch.dtype) -> Sample:
    x, residual, weight, bias = tensors(size, dtype)
    if size.mean and dtype != torch.float32:
        # Their sum rounds to bf16's spacing there before the norm, which would make most of the result: with steps of it the sum is exact.
        x, residual = ((t / 8).round() * 8 for t in (x, residual))
    wanted = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    return Sample((x, residual, weight, bias, EPS), wanted=wanted, scales=scales(x + residual, weight, bias, inputs=2, outputs=2))


def checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    x, _, weight, bias = tensors(Size((3, 8)), dtype)
    assert bias is not None
    leaves = tuple(t.clone().requires_grad_() for t in (x, weight, bias))
    ops = torch.ops.dist_llm
    _, mean, rstd = ops.layer_norm(x, weight, bias, EPS)
    return [
        (ops.layer_norm, (*leaves, EPS)),
        (ops.layer_norm, (*leaves[:2], None, EPS)),
        (ops.layer_norm_backward, (torch.randn_like(x), x, weight, mean, rstd, None, True)),
        (ops.layer_norm_backward, (torch.randn_like(x), x, weight, mean, rstd, None, False)),
    ]


def checks_residual(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    x, residual, weight, bias = tensors(Size((3, 8)), dtype)
    assert bias is not None
    leaves = tuple(t.clone().requires_grad_() for t in (x, residual, weight, bias))
    ops = torch.ops.dist_llm
    _, mean, rstd = ops.layer_norm(x, weight, bias, EPS)
    return [
        (ops.layer_norm_residual, (*leaves, EPS)),
        (ops.layer_norm_backward, (residual, x, weight, mean, rstd, residual.clone(), True)),
    ]


CASES = [
    Case("layer_norm", IMPLS, SIZES, make, checks, gpu_sizes=GPU_SIZES),
    Case("layer_norm_residual", RESIDUAL_IMPLS, SIZES, make_residual, checks_residual, gpu_sizes=GPU_SIZES),
]
