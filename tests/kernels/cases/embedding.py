"""Rows of a table, and the gradient of the table, whole or added to one that is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_llm.kernels.embedding import BACKWARD_INTO_IMPLS, IMPLS
from tests.kernels.case import Case, Sample


@dataclass(frozen=True)
class Size:
    """Shape of the ids, and of the table; ``only``: all ids are this one; ``other_dtype``: of the table, where not the activations'."""

    ids: tuple[int, ...]
    rows: int
    dim: int
    only: int | None = None
    other_dtype: torch.dtype | None = None


SIZES = {
    "odd": Size((5, 123), 123, 123),
    "head dim 40": Size((3, 7), 11, 40),
    "one token": Size((1,), 5, 64),
    "no token": Size((0,), 6, 16),
    "one column": Size((50,), 9, 1),
    "all tokens to one row": Size((2, 150), 40, 48, only=17),
    "fp32 table of many rows": Size((2, 177), 70_001, 3, other_dtype=torch.float32),
    "many rows": Size((700,), 5000, 16),
    "bf16 table, wider than a block": Size((90,), 30, 1100, other_dtype=torch.bfloat16),
    "a whole gradient past the caches": Size((4, 100), 3000, 384, other_dtype=torch.float32),
}
GPU_SIZES = {"a model's": Size((8, 2048), 50304, 1024)}


def tensors(size: Size, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, table, gradient of the rows."""
    generator = torch.Generator().manual_seed(13)
    ids = torch.randint(0, size.rows, size.ids, generator=generator)
    if size.only is not None:
        ids.fill_(size.only)
    table = torch.randn(size.rows, size.dim, generator=generator).to(size.other_dtype or dtype)
    grad = torch.randn(*size.ids, size.dim, generator=generator).to(dtype)
    return ids, table, grad


def make(size: Size, dtype: torch.dtype) -> Sample:
    ids, table, _ = tensors(size, dtype)
    # A gradient is a sum over the tokens of a row, of numbers up to 3.
    most = int(ids.flatten().bincount().max()) if ids.numel() else 0
    return Sample((ids, table, dtype), wanted=(1,), scales={1: 3.0 * most})


def make_into(size: Size, dtype: torch.dtype) -> Sample:
    ids, table, grad = tensors(size, dtype)
    return Sample((grad, ids, table), changed=(2,))


def checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    ids, table, grad = tensors(Size((2, 3), 5, 8), dtype)
    ops = torch.ops.dist_llm
    return [
        (ops.embedding, (ids, table.clone().requires_grad_(), torch.bfloat16)),
        (ops.embedding, (ids, table.clone().requires_grad_(), torch.float32)),
        (ops.embedding_backward, (grad, ids, 5, torch.float32)),
    ]


def checks_into(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    ids, table, grad = tensors(Size((2, 3), 5, 8), dtype)
    return [(torch.ops.dist_llm.embedding_backward_into, (grad, ids, table))]


CASES = [
    Case("embedding", IMPLS, SIZES, make, checks, gpu_sizes=GPU_SIZES),
    Case("embedding_backward_into", BACKWARD_INTO_IMPLS, SIZES, make_into, checks_into, gpu_sizes=GPU_SIZES),
]
