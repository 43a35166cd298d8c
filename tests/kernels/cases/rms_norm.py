"""RMSNorm, alone and with the residual addition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dist_llm.kernels.rms_norm import IMPLS, RESIDUAL_IMPLS
from tests.kernels.case import Case, Sample

EPS = 1e-5


class Fp32Weight(tuple[int, ...]):
    """A shape whose weight is in fp32 whatever x is."""


SIZES = {
    "odd": (5, 123, 123),
    "head dim 40": (3, 40),
    "one element": (7, 1),
    "one row": (40,),
    "no row": (0, 16),
    "many rows": (300, 257),
    "wide": (6, 1024),
    "fp32 weight": Fp32Weight((67, 96)),
    "fp32 weight, wider than the first cache": Fp32Weight((5, 3333)),
}
GPU_SIZES = {"rows of a model": (1200, 4096), "more than a block holds": (3, 40000)}


def tensors(size: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x, residual = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(size[-1], generator=generator)
    return x, residual, weight.to(torch.float32 if isinstance(size, Fp32Weight) else dtype)


def gradient_scales(x: torch.Tensor, weight: torch.Tensor, first: int) -> dict[int, float]:
    """dx is a difference (of equal numbers at D = 1), dweight a sum over rows; arriving gradients are at most 3."""
    if x.numel() == 0:
        return {}
    rstd = (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    rows = x.numel() // x.shape[-1]
    return {
        first: float(2 * 3 * (rstd * weight.double().abs()).max() + 3),
        first + 1: float(3 * (rstd * x.double().abs()).max() * rows),
    }


def make(size: tuple[int, ...], dtype: torch.dtype) -> Sample:
    x, _, weight = tensors(size, dtype)
    return Sample((x, weight, EPS), wanted=(0, 1), scales=gradient_scales(x, weight, 1))


def make_residual(size: tuple[int, ...], dtype: torch.dtype) -> Sample:
    x, residual, weight = tensors(size, dtype)
    dx_dweight = gradient_scales(x + residual, weight, 2)
    scales = {2: dx_dweight[2], 3: dx_dweight[2], 4: dx_dweight[3]} if dx_dweight else {}
    return Sample((x, residual, weight, EPS), wanted=(0, 1, 2), scales=scales)


def checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    x, _, weight = tensors((3, 8), dtype)
    rstd = torch.ops.dist_llm.rms_norm(x, weight, EPS)[1]
    ops = torch.ops.dist_llm
    return [
        (ops.rms_norm, (x.clone().requires_grad_(), weight.clone().requires_grad_(), EPS)),
        (ops.rms_norm_backward, (torch.randn_like(x), x, weight, rstd, None)),
    ]


def checks_residual(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    x, residual, weight = tensors((3, 8), dtype)
    leaves = tuple(t.clone().requires_grad_() for t in (x, residual, weight))
    rstd = torch.ops.dist_llm.rms_norm(x, weight, EPS)[1]
    ops = torch.ops.dist_llm
    return [(ops.rms_norm_residual, (*leaves, EPS)), (ops.rms_norm_backward, (residual, x, weight, rstd, residual.clone()))]


CASES = [
    Case("rms_norm", IMPLS, SIZES, make, checks, gpu_sizes=GPU_SIZES),
    Case("rms_norm_residual", RESIDUAL_IMPLS, SIZES, make_residual, checks_residual, gpu_sizes=GPU_SIZES),
]
