"""Cross-entropy: whole, behind a linear layer, and over the columns of a vocabulary that is divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dist_llm.kernels.cross_entropy import BACKWARD_IMPLS, IMPLS, LINEAR_IMPLS, PARTIALS_IMPLS
from tests.kernels.case import Case, Sample

IGNORE = -100
# Rows, vocabulary, and standard deviation and mean of the logits: a fresh model, a sure one, a drifted one, all negative.
Size = tuple[int, int, float, float]
SIZES: dict[str, Size] = {
    "odd": (9, 123, 4.0, 0.0),
    "one column": (5, 1, 4.0, 0.0),
    "less than a vector": (7, 3, 0.1, 0.0),
    "a vector and one": (3, 33, 30.0, 0.0),
    "drifted": (6, 1000, 3.0, 50.0),
    "negative": (4, 3000, 2.0, -70.0),
    "a block and one": (3, 8193, 4.0, 0.0),
    "far away": (3, 2500, 2.0, 20000.0),
    "a usual vocabulary": (2, 50257, 4.0, 0.0),
    "one row": (1, 40, 4.0, 0.0),
    "no row": (0, 16, 4.0, 0.0),
}
GPU_SIZES: dict[str, Size] = {"a batch of a model": (4096, 50304, 4.0, 0.0), "a large vocabulary": (64, 256000, 4.0, 0.0)}
# Rows, model dim, vocabulary.
LINEAR_SIZES = {
    "more rows than chunks": (48, 16, 100),
    "chunks of unequal size": (37, 24, 65),
    "fewer rows than chunks": (5, 8, 1000),
    "one row": (1, 8, 30),
    "no row": (0, 8, 30),
}


def inputs(size: Size, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and targets of which the first is ignored where there are others."""
    rows, vocab, deviation, mean = size
    generator = torch.Generator().manual_seed(11)
    logits = (deviation * torch.randn(rows, vocab, generator=generator) + mean).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[: min(1, rows - 1)] = IGNORE
    return logits, targets


def largest_lse(logits: torch.Tensor) -> float:
    """Of the rows, by size."""
    return logits.double().logsumexp(-1).abs().max().item() if logits.numel() else 0.0


def make(size: Size, dtype: torch.dtype) -> Sample:
    logits, targets = inputs(size, dtype)
    z_loss = 1e-2 if size[0] % 2 else 0.0
    # The gradient is dloss p (1 + 2 z_loss lse) - dloss [target]; arriving gradients are at most 3.
    scales = {1: 3 * (1 + 2 * z_loss * largest_lse(logits))}
    return Sample((logits, targets), {"ignore": IGNORE, "z_loss": z_loss}, wanted=(0,), scales=scales)


def make_partials(size: Size, dtype: torch.dtype) -> Sample:
    """Columns from 1 on: the targets of the first rank's are elsewhere."""
    logits, targets = inputs(size, dtype)
    return Sample((logits, targets), {"ignore": IGNORE, "vocab_start": 1})


def make_backward(size: Size, dtype: torch.dtype) -> Sample:
    logits, targets = inputs(size, dtype)
    row_max, row_sum, _ = PARTIALS_IMPLS[-1].fn(logits, targets, ignore=IGNORE)
    z_loss = 1e-2 if size[0] % 2 else 0.0
    scales = {0: 0.37 * (1 + 2 * z_loss * largest_lse(logits))}
    return Sample((torch.tensor(0.37), logits, targets, row_max, row_sum), {"ignore": IGNORE, "z_loss": z_loss}, scales=scales)


def make_linear(size: tuple[int, int, int], dtype: torch.dtype) -> Sample:
    rows, dim, vocab = size
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, dim, generator=generator).to(dtype)
    weight = (torch.randn(vocab, dim, generator=generator) * dim**-0.5).to(dtype)
    targets = inputs((rows, vocab, 1.0, 0.0), dtype)[1]
    # Sums of products; the terms of each are below 3 (the arriving gradient) times what a row has.
    scales = {1: 3 * float(weight.double().abs().max()) * 2, 2: 3 * float(hidden.double().abs().sum(0).max()) if rows else 0.0}
    return Sample((hidden, weight, targets), {"ignore": IGNORE, "z_loss": 1e-3}, wanted=(0, 1), scales=scales)


def checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    ops = torch.ops.dist_llm
    logits, targets = inputs((5, 40, 4.0, 0.0), dtype)
    _, row_max, row_sum = ops.cross_entropy(logits, targets, IGNORE, 0.1)
    return [
        (ops.cross_entropy, (logits.clone().requires_grad_(), targets, IGNORE, 0.1)),
        (ops.cross_entropy_backward, (torch.tensor(0.37), logits, targets, row_max, row_sum, IGNORE, 0.1, 0)),
        (ops.cross_entropy_partials, (logits, targets, IGNORE, 3)),
        (ops.cross_entropy_grad_, (logits.clone(), targets, IGNORE, 0.1)),
        (ops.cross_entropy_add_, (torch.zeros(5, 40), logits)),
    ]


def checks_linear(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    hidden, weight, targets = make_linear((20, 8, 40), dtype).args
    found = []
    for needs_grad in (False, True):
        leaves = [t.clone().requires_grad_(needs_grad) for t in (hidden, weight)]
        found.append((torch.ops.dist_llm.linear_cross_entropy, (*leaves, targets, IGNORE, 0.1, 4, needs_grad)))
    return found


def no_checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    """The ops are those of the first case."""
    del dtype
    return []


CASES = [
    Case("cross_entropy", IMPLS, SIZES, make, checks, gpu_sizes=GPU_SIZES),
    Case("cross_entropy_partials", PARTIALS_IMPLS, SIZES, make_partials, no_checks, gpu_sizes=GPU_SIZES),
    Case("cross_entropy_backward", BACKWARD_IMPLS, SIZES, make_backward, no_checks, gpu_sizes=GPU_SIZES),
    Case("linear_cross_entropy", LINEAR_IMPLS, LINEAR_SIZES, make_linear, checks_linear),
]
