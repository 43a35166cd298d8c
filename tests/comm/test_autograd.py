"""Forward and backward of each collective are those of the same arithmetic in one process.

Numbers are small integers, so that sums are exact in any order and equality can be asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dist_llm.comm.autograd import copy_to_group, gather_from_group, reduce_from_group, reduce_scatter_to_group
from dist_llm.comm.context import SINGLE, Group, ParallelContext
from dist_llm.parallel.ranks import run_on_ranks

DIMS = (0, 1, 2, -1, -2)


def integers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def through(fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output of ``fn``, the gradient it was given and the one it passed on."""
    leaf = x.clone().requires_grad_()
    y = fn(leaf)
    dy = integers(tuple(y.shape), seed)
    y.backward(dy.to(y.dtype))
    assert leaf.grad is not None
    return y.detach(), dy, leaf.grad


def run_all(ctx: ParallelContext) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Every pair along every dimension, in fp32 and bf16, also of inputs that are not contiguous."""
    tp, n = ctx.tp, ctx.tp.size
    answers = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = integers((2 * n, 3 * n, 5 * n), tp.rank).to(dtype)
        for name, own in (("", x), ("transposed ", integers((5 * n, 3 * n, 2 * n), tp.rank).to(dtype).transpose(0, 2))):
            key = f"{name}{dtype}"
            # What is copied is the same on every rank; every rank then uses it for something else.
            answers[f"copy {key}"] = through(lambda x: copy_to_group(x, tp), torch.ones_like(own), 10 + tp.rank)
            # What was reduced is the same on every rank, and so is what is made of it.
            answers[f"reduce {key}"] = through(lambda x: reduce_from_group(x, tp), own, 10)
            for dim in DIMS:
                gather = lambda x, dim=dim: gather_from_group(x, tp, dim)  # noqa: E731
                scatter = lambda x, dim=dim: reduce_scatter_to_group(x, tp, dim)  # noqa: E731
                answers[f"gather {dim} {key}"] = through(gather, own, 10 + tp.rank)
                answers[f"scatter {dim} {key}"] = through(scatter, own, 10 + tp.rank)
    return answers


def refuse_uneven(ctx: ParallelContext) -> str:
    try:
        reduce_scatter_to_group(torch.ones(4, 3 * ctx.tp.size + 1), ctx.tp, 1)
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_pair_is_its_formula_forward_and_backward_along_every_dimension(ranks: int) -> None:
    answers = run_on_ranks(run_all, tp=ranks)
    for key in answers[0]:
        own = [integers((2 * ranks, 3 * ranks, 5 * ranks), r) for r in range(ranks)]
        if "transposed" in key:
            own = [integers((5 * ranks, 3 * ranks, 2 * ranks), r).transpose(0, 2) for r in range(ranks)]
        ys, dys, dxs = zip(*(answer[key] for answer in answers), strict=True)
        assert all(t.dtype == (torch.bfloat16 if "bfloat16" in key else torch.float32) for t in (*ys, *dxs)), key
        total_dy = torch.stack(dys).sum(0)
        kind, dim = key.split(" ")[0], key.split(" ")[1]
        for rank in range(ranks):
            if kind == "copy":
                y, dx = torch.ones_like(own[0]), total_dy
            elif kind == "reduce":
                y, dx = torch.stack(own).sum(0), dys[rank]
            elif kind == "gather":
                y, dx = torch.cat(own, int(dim)), total_dy.chunk(ranks, int(dim))[rank]
            else:
                y, dx = torch.stack(own).sum(0).chunk(ranks, int(dim))[rank], torch.cat(dys, int(dim))
            assert torch.equal(ys[rank].float(), y), (key, rank)
            assert torch.equal(dxs[rank].float(), dx), (key, rank)


def test_a_dimension_that_the_ranks_do_not_divide_is_refused_with_both_numbers() -> None:
    for message in run_on_ranks(refuse_uneven, tp=2):
        assert "dimension 1" in message and "(4, 7)" in message and "2 ranks" in message


def test_on_one_rank_each_is_the_identity_itself() -> None:
    x = torch.ones(3, 5, requires_grad=True)
    for group in (SINGLE, Group(rank=0, size=1, name="tp")):
        for fn in (copy_to_group, reduce_from_group):
            assert fn(x, group) is x
        for along in (gather_from_group, reduce_scatter_to_group):
            assert along(x, group, 1) is x
