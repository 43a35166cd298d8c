"""What the ranks of test_pipeline.py and test_timeline.py do: top-level functions, since ranks import them by name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from dist_llm.comm.collectives import barrier, broadcast_json
from dist_llm.comm.context import ParallelContext
from dist_llm.parallel import timeline as timeline_module
from dist_llm.parallel.pipeline import Pipeline
from dist_llm.parallel.timeline import gather_timeline
from dist_llm.topology.schedule import bubble_fraction

WIDTH = 8


def layer(number: int, width: int = WIDTH) -> torch.nn.Linear:
    """Layer ``number`` of the toy chain, the same on every rank and in the test."""
    made = torch.nn.Linear(width, width, dtype=torch.float64)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / width**0.5)
    return made


def rows(micro: int, count: int, width: int = WIDTH) -> torch.Tensor:
    """(count, width) input of a micro-batch."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1000 + micro), dtype=torch.float64)


def apply(stage: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(stage(x))


def loss_of(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.square().sum()


class Chain:
    """A pipeline of one linear layer a stage, as a rank has it."""

    def __init__(self, ctx: ParallelContext, schedule: str, chunks: int, width: int = WIDTH) -> None:
        self.pipeline = Pipeline(ctx, schedule=schedule, chunks=chunks, dtype=torch.float64)
        self.layers = {chunk: layer(chunk * ctx.pp.size + ctx.pp.rank, width) for chunk in range(chunks)}
        self.width = width
        self.losses: dict[int, float] = {}
        self.backwards: list[tuple[int, int, bool]] = []

    def forward(self, micro: int, chunk: int, hidden: torch.Tensor | None, *, count: int) -> torch.Tensor:
        assert (hidden is None) == self.pipeline.is_first(chunk)
        out = apply(self.layers[chunk], rows(micro, count, self.width) if hidden is None else hidden)
        return loss_of(out) if self.pipeline.is_last(chunk) else out

    def step(self, counts: Sequence[int]) -> None:
        """Forward and backward of micro-batches with so many rows."""

        def forward(micro: int, chunk: int, hidden: torch.Tensor | None) -> torch.Tensor:
            out = self.forward(micro, chunk, hidden, count=counts[micro])
            if self.pipeline.is_last(chunk):
                self.losses[micro] = out.item()
            return out

        def backward(micro: int, chunk: int, out: torch.Tensor, grad: torch.Tensor | None, is_last: bool) -> None:
            assert (grad is None) == self.pipeline.is_last(chunk)
            self.backwards.append((micro, chunk, is_last))
            torch.autograd.backward(out, grad)

        self.pipeline.run([torch.Size((count, self.width)) for count in counts], forward, backward)

    def answer(self, pp: int, rank: int) -> dict[str, Any]:
        grads = {chunk * pp + rank: [p.grad for p in each.parameters()] for chunk, each in self.layers.items()}
        return {"losses": self.losses, "grads": grads, "backwards": self.backwards, "spans": len(self.pipeline.spans)}


def chain_steps(ctx: ParallelContext, schedule: str, chunks: int, cases: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """One step of a fresh chain for each case: rows of its micro-batches."""
    answers = []
    for counts in cases:
        chain = Chain(ctx, schedule, chunks)
        chain.step(counts)
        answers.append(chain.answer(ctx.pp.size, ctx.pp.rank))
    return answers


def evaluation_between_steps(ctx: ParallelContext, schedule: str, chunks: int, counts: Sequence[int]) -> dict[str, Any]:
    """A step, three evaluations of other sizes, another step; what the evaluations gave."""
    chain = Chain(ctx, schedule, chunks)
    chain.step(counts)
    evaluated = []
    for micro, count in ((40, 3), (41, 1), (42, 5)):
        run = lambda _, chunk, hidden, micro=micro, count=count: chain.forward(micro, chunk, hidden, count=count)  # noqa: E731
        out = chain.pipeline.forward_only(torch.Size((count, WIDTH)), run)
        assert out is None or not out.requires_grad
        evaluated.append(None if out is None else out.item())
    chain.step(counts)
    return {"evaluated": evaluated, **chain.answer(ctx.pp.size, ctx.pp.rank)}


def slow_last_stage(ctx: ParallelContext, chunks: int, counts: Sequence[int], width: int) -> dict[str, Any]:
    """The last stage comes late, so that what the first has to send piles up, each message larger than a socket's buffer."""
    chain = Chain(ctx, "interleaved", chunks, width)
    if ctx.is_last_stage:
        time.sleep(0.5)
    chain.step(counts)
    return chain.answer(ctx.pp.size, ctx.pp.rank)


def one_stage_fails(ctx: ParallelContext, stage: int, kind: str) -> None:
    """Stage ``stage`` raises in its third forward or backward."""
    pipeline = Pipeline(ctx, schedule="1f1b", chunks=1, dtype=torch.float64)
    mine = layer(ctx.pp.rank)

    def fail(here: str, micro: int) -> None:
        if here == kind and micro == 2 and ctx.pp.rank == stage:
            raise ArithmeticError(f"planted in {here}{micro}")

    def forward(micro: int, chunk: int, hidden: torch.Tensor | None) -> torch.Tensor:
        fail("F", micro)
        out = apply(mine, rows(micro, 2) if hidden is None else hidden)
        return loss_of(out) if pipeline.is_last(chunk) else out

    def backward(micro: int, chunk: int, out: torch.Tensor, grad: torch.Tensor | None, is_last: bool) -> None:
        del chunk, is_last
        fail("B", micro)
        torch.autograd.backward(out, grad)

    pipeline.run([torch.Size((2, WIDTH))] * 6, forward, backward)


def fixed_cost_steps(
    ctx: ParallelContext, schedule: str, chunks: int, num_micro: int, seconds: float, within: float, attempts: int
) -> list[dict[str, Any]]:
    """Timelines of steps whose forwards take ``seconds`` and backwards twice that, until one's bubble is theory's, or enough.

    Stages sleep: any number of them runs at once on any number of cores.
    """
    pipeline = Pipeline(ctx, schedule=schedule, chunks=chunks, dtype=torch.float32)

    def forward(micro: int, chunk: int, hidden: torch.Tensor | None) -> torch.Tensor:
        del micro, chunk
        time.sleep(seconds)
        return (torch.ones(1, 1, requires_grad=True) if hidden is None else hidden) * 1.0

    def backward(micro: int, chunk: int, out: torch.Tensor, grad: torch.Tensor | None, is_last: bool) -> None:
        del micro, chunk, is_last
        time.sleep(2 * seconds)
        torch.autograd.backward(out.sum() if grad is None else out, grad)

    found = []
    for number in range(attempts):
        barrier(ctx.world, ctx.device)
        pipeline.run([torch.Size((1, 1))] * num_micro, forward, backward)
        timeline = gather_timeline(pipeline, ctx, step=number, schedule=schedule)
        bubble = broadcast_json(timeline.bubble if timeline is not None else None, ctx.world, ctx.device)
        if timeline is not None:
            found.append({"actions": [asdict(a) for a in timeline.actions], "bubble": timeline.bubble, "theory": timeline.bubble_theory})
        if abs(bubble - bubble_fraction(ctx.pp.size, num_micro, chunks)) <= within:
            break
    return found


def timelines_beside_data_parallel(ctx: ParallelContext) -> dict[str, Any]:
    """One step at pp 2, dp 2; which ranks the gathered timeline has, None where this rank gets none."""
    chain = Chain(ctx, "1f1b", 1)
    chain.step([2, 2, 2])
    timeline = gather_timeline(chain.pipeline, ctx, step=7, schedule="1f1b")
    return {
        "stage": ctx.pp.rank,
        "pipeline": ctx.pp.ranks,
        "ranks": None if timeline is None else sorted({a.rank for a in timeline.actions}),
    }


def stages_on_two_machines(ctx: ParallelContext, ahead_s: float) -> dict[str, Any] | None:
    """A step of stages that sleep, the second with a clock of its own, as on another machine; the gathered timeline."""
    real = time.perf_counter
    if ctx.pp.rank == 1:  # this rank was forked for this call: what is replaced here is gone with it
        time.perf_counter = lambda: real() + ahead_s
    timeline_module._node = lambda: f"machine {ctx.pp.rank}"
    pipeline = Pipeline(ctx, schedule="1f1b", chunks=1, dtype=torch.float32)

    def forward(micro: int, chunk: int, hidden: torch.Tensor | None) -> torch.Tensor:
        del micro, chunk
        time.sleep(0.05)
        return (torch.ones(1, 1, requires_grad=True) if hidden is None else hidden) * 1.0

    def backward(micro: int, chunk: int, out: torch.Tensor, grad: torch.Tensor | None, is_last: bool) -> None:
        del micro, chunk, is_last
        time.sleep(0.1)
        torch.autograd.backward(out.sum() if grad is None else out, grad)

    pipeline.run([torch.Size((1, 1))] * 2, forward, backward)
    timeline = gather_timeline(pipeline, ctx, step=1, schedule="1f1b")
    return None if timeline is None else asdict(timeline)
