"""The executor on real ranks: the numbers of one process, whatever the schedule, the number of micro-batches and their sizes."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dist_llm.parallel.ranks import RanksFailed, run_on_ranks
from dist_llm.topology.schedule import orders
from tests.parallel import pipeline_programs as programs


@functools.cache
def one_process(num_layers: int, counts: tuple[int, ...], width: int = programs.WIDTH) -> tuple[dict[int, float], list[list[torch.Tensor]]]:
    """Losses and gradients of the whole chain, micro-batch after micro-batch."""
    layers = [programs.layer(number, width) for number in range(num_layers)]
    losses = {}
    for micro, count in enumerate(counts):
        x = programs.rows(micro, count, width)
        for each in layers:
            x = programs.apply(each, x)
        loss = programs.loss_of(x)
        losses[micro] = loss.item()
        loss.backward()
    return losses, [[p.grad for p in each.parameters() if p.grad is not None] for each in layers]


def require_equal(answers: Sequence[dict[str, Any]], counts: tuple[int, ...], chunks: int, width: int = programs.WIDTH) -> None:
    """Every stage's answer of one step against one process.

    Digit for digit: each stage does the same products on the same numbers, and every schedule takes the backwards of a chunk
    in the order of its micro-batches, so the sums are in the same order too.
    """
    losses, grads = one_process(len(answers) * chunks, counts, width)
    for rank, answer in enumerate(answers):
        assert answer["losses"] == (losses if rank == len(answers) - 1 else {})
        assert answer["spans"] == 2 * chunks * len(counts)
        assert [last for _, _, last in answer["backwards"]] == [False] * (chunks * len(counts) - 1) + [True]
        for number, mine in answer["grads"].items():
            assert all(torch.equal(a, b) for a, b in zip(mine, grads[number], strict=True)), f"gradients of layer {number}"
    assert sorted(number for answer in answers for number in answer["grads"]) == list(range(len(answers) * chunks))


@pytest.mark.parametrize("pp", [2, 3, 4])
def test_1f1b_gives_the_losses_and_gradients_of_one_process_for_any_micro_batches(pp: int) -> None:
    # Fewer micro-batches than stages, as many, more; of equal and of different sizes.
    cases = [(2,) * m for m in range(1, 7)] + [(3, 1, 5), (1, 4, 2, 2, 7, 1)]
    answers = run_on_ranks(programs.chain_steps, pp=pp, args=("1f1b", 1, cases))
    for i, counts in enumerate(cases):
        require_equal([answer[i] for answer in answers], counts, 1)


@pytest.mark.parametrize(("pp", "chunks"), [(2, 2), (2, 3), (3, 2), (4, 2)])
def test_interleaved_gives_the_losses_and_gradients_of_one_process(pp: int, chunks: int) -> None:
    cases = [(2,) * pp, (1, 3, 2, 5, 1, 2, 4, 2)[: 2 * pp] if pp < 4 else (1, 3, 2, 5, 1, 2, 4, 2)]
    answers = run_on_ranks(programs.chain_steps, pp=pp, args=("interleaved", chunks, cases))
    for i, counts in enumerate(cases):
        require_equal([answer[i] for answer in answers], counts, chunks)


def test_actions_run_in_the_order_of_the_schedule() -> None:
    (first, second) = run_on_ranks(programs.chain_steps, pp=2, args=("interleaved", 2, [(1, 1, 1, 1)]))
    for rank, (answer,) in enumerate((first, second)):
        order = orders("interleaved", 2, 4, 2)[rank]
        assert [(micro, chunk) for micro, chunk, _ in answer["backwards"]] == [(a.micro, a.chunk) for a in order if a.kind == "B"]


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2)])
def test_evaluation_between_steps_gives_the_loss_on_the_last_stage_and_leaves_no_gradient(schedule: str, chunks: int) -> None:
    counts = (2, 3)
    answers = run_on_ranks(programs.evaluation_between_steps, pp=2, args=(schedule, chunks, counts))
    assert answers[0]["evaluated"] == [None] * 3
    expected = []
    for micro, count in ((40, 3), (41, 1), (42, 5)):
        x = programs.rows(micro, count)
        for number in range(2 * chunks):
            x = programs.apply(programs.layer(number), x)
        expected.append(programs.loss_of(x).item())
    assert answers[1]["evaluated"] == expected
    # Two equal steps, so twice the gradients of one: nothing came from the evaluations.
    _, grads = one_process(2 * chunks, counts)
    for answer in answers:
        for number, mine in answer["grads"].items():
            for a, b in zip(mine, grads[number], strict=True):
                # The second step adds to sums that are already there, in another order than doubling: float64 rounding.
                torch.testing.assert_close(a, 2 * b, rtol=1e-12, atol=1e-12)


def test_messages_that_pile_up_before_a_late_stage_all_arrive() -> None:
    counts, width, chunks = (64,) * 8, 1024, 3  # half a megabyte each; the first stage sends six before it must wait
    answers = run_on_ranks(programs.slow_last_stage, pp=2, args=(chunks, counts, width))
    require_equal(answers, counts, chunks, width)


@pytest.mark.parametrize("kind", ["F", "B"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_failing_stage_ends_all_and_is_named(stage: int, kind: str) -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=rf"rank {stage} of 3 raised ArithmeticError: planted in {kind}2") as caught:
        run_on_ranks(programs.one_stage_fails, pp=3, args=(stage, kind), deadline_s=60)
    assert caught.value.rank == stage
    assert time.monotonic() - start < 30, "the others waited for the deadline"
