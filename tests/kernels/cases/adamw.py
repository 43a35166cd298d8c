"""AdamW in one pass, and the sum of squares that clipping starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dist_llm.kernels.adamw import IMPLS, SUM_OF_SQUARES_IMPLS
from tests.kernels.case import Case, Sample

OPTIONS = {"lr": 3e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
# Shapes of the parameters, the step, and whether there are copies.
SIZES: dict[str, tuple[list[tuple[int, ...]], int, bool]] = {
    "a model": ([(65, 40), (40,), (123, 41), (1, 1)], 7, True),
    "first step": ([(5, 123, 23)], 1, False),
    "a scalar": ([()], 2, True),
    "an empty one between": ([(33,), (0, 16), (17,)], 3, True),
    "more than one piece": ([(3, 8192), (8193,)], 100, True),
    "more tensors than a launch has": ([(3,)] * 520, 4, True),
    "no parameters": ([], 1, False),
}


def make(size: tuple[list[tuple[int, ...]], int, bool], dtype: torch.dtype) -> Sample:
    shapes, step, has_copies = size
    generator = torch.Generator().manual_seed(11)

    def draw(scale: float) -> list[torch.Tensor]:
        return [scale * torch.randn(shape, generator=generator) for shape in shapes]

    params, grads = draw(1.0), [g.to(dtype) for g in draw(0.1)]
    # Moments of a run under way: of the size that gradients of this size give them.
    exp_avgs, exp_avg_sqs = draw(0.03), [v.square() for v in draw(0.1)]
    copies = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes] if has_copies else None
    return Sample(
        (params, grads, exp_avgs, exp_avg_sqs),
        {**OPTIONS, "step": step, "grad_scale": torch.tensor(0.37), "copies": copies},
        changed=(0, 2, 3, "copies") if has_copies else (0, 2, 3),
    )


def make_sum(size: tuple[list[tuple[int, ...]], int, bool], dtype: torch.dtype) -> Sample:
    shapes = size[0] or [(0,)]
    generator = torch.Generator().manual_seed(12)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    # Reference and truth are one and the same here, both with the roundings of an fp64 sum: sixteen of them are no error,
    # of which the suite counts four.
    total = sum(t.double().square().sum().item() for t in tensors)
    return Sample(([*tensors, tensors[0].float()],), scales={0: 4 * total})


def checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    sample = make(SIZES["an empty one between"], dtype)
    params, grads, exp_avgs, exp_avg_sqs = sample.args
    numbers = (torch.tensor(0.5), 1e-3, 0.9, 0.95, 1e-8, 0.1, 2.0)
    op = torch.ops.dist_llm.adamw_step
    return [(op, (params, grads, exp_avgs, exp_avg_sqs, copies, *numbers)) for copies in (sample.kwargs["copies"], [])]


def checks_sum(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    return [(torch.ops.dist_llm.sum_of_squares, make_sum(SIZES["a model"], dtype).args)]


# Asked for by the name of torch, the sum is the reference itself.
SUMS = tuple(impl for impl in SUM_OF_SQUARES_IMPLS if impl.name != "torch")

CASES = [
    Case("adamw_step", IMPLS, SIZES, make, checks),
    Case("sum_of_squares", SUMS, SIZES, make_sum, checks_sum),
]
