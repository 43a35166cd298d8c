"""Cross-entropy of logits whose columns are spread over ranks, against all columns in one process."""

from __future__ import annotations

import itertools

import torch

from dist_llm.comm.build import build_context
from dist_llm.comm.context import ParallelContext
from dist_llm.kernels.cross_entropy import BACKWARD_IMPLS, PARTIALS_IMPLS
from dist_llm.kernels.cross_entropy.reference import cross_entropy_reference
from dist_llm.layers.cross_entropy import VocabParallelCrossEntropy
from dist_llm.parallel.ranks import run_on_ranks
from dist_llm.planning.shards import vocab_range
from dist_llm.topology.grid import RankGrid

IGNORE = -100
ROWS = 7
CASES = list(itertools.product(((8, 2), (7, 2), (10, 4), (123, 4)), (torch.float32, torch.bfloat16), (0.0, 1e-2)))


def make(vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all columns and targets: the first and the last column, ignored rows, a row whose first columns are -inf."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (4 * torch.randn(ROWS, vocab, generator=generator)).to(dtype)
    logits[3, : vocab // 2] = float("-inf")  # all columns that the first of two ranks holds
    targets = torch.randint(0, vocab, (ROWS,), generator=generator)
    targets[0], targets[1], targets[2], targets[3], targets[5] = 0, vocab - 1, IGNORE, vocab - 1, IGNORE
    return logits, targets


def run_cases(ctx: ParallelContext) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss and this rank's columns of the gradient, of each case and each implementation that runs here."""
    at = {tp: build_context(RankGrid({"tp": tp, "dp": 4 // tp}), ctx.world.rank, ctx.device).tp for tp in (2, 4)}
    answers = []
    for (vocab, tp), dtype, z_loss in CASES:
        logits, targets = make(vocab, dtype)
        start, stop = vocab_range(vocab, tp, at[tp].rank)
        for partials, backward in zip(PARTIALS_IMPLS, BACKWARD_IMPLS, strict=True):
            if partials.why_not(ctx.device, dtype) is not None:
                continue
            fn = VocabParallelCrossEntropy(tp=at[tp], vocab_start=start, partials=partials.fn, backward=backward.fn)
            leaf = logits[:, start:stop].clone().requires_grad_()
            loss = fn(leaf, targets, ignore=IGNORE, z_loss=z_loss)
            (3 * loss).backward()
            answers.append((loss.detach(), leaf.grad))
    return answers


def test_loss_and_gradient_are_those_of_all_columns_in_one_process() -> None:
    ranks = run_on_ranks(run_cases, dp=4)
    per_case = len(ranks[0]) // len(CASES)
    assert per_case >= 1
    for number, ((vocab, tp), dtype, z_loss) in enumerate(CASES):
        logits, targets = make(vocab, dtype)
        wide = logits.double().requires_grad_()
        expected = cross_entropy_reference(wide, targets, ignore=IGNORE, z_loss=z_loss)
        (3 * expected).backward()
        expected = expected.detach()
        for i in range(per_case):
            losses, grads = zip(*(rank[number * per_case + i] for rank in ranks), strict=True)
            case = (vocab, tp, dtype, z_loss, i)
            assert all(loss.dtype == torch.float32 and torch.equal(loss, losses[0]) for loss in losses), case
            # fp32 sums of up to 123 exponentials and 7 rows: a few roundings of 6e-8.
            assert abs(float(losses[0]) - float(expected)) <= 1e-6 * abs(float(expected)), case
            for first in range(0, 4, tp):  # every tp group of the four ranks
                grad = torch.cat(grads[first : first + tp], 1)
                assert grad.dtype == dtype
                # bf16 gradients are computed in fp32 and rounded once, to 8 bits.
                limit = 1e-6 if dtype == torch.float32 else 2**-8
                error = (grad.double() - wide.grad).abs().max() / wide.grad.abs().max()
                assert float(error) <= limit, case
                assert torch.equal(grad[targets == IGNORE], torch.zeros_like(grad[targets == IGNORE])), case
