"""The timeline of a training step's pipeline, gathered from its stages and appended to ``timeline.jsonl`` by the main rank.

Only the pipeline that the main rank belongs to is recorded, so the cost does not grow with the world: one gather over its
stages, after the step and outside of its measured time. Ranks of one node read the same clock (``time.perf_counter`` is that of
the machine). Clocks of several nodes start at unrelated moments; they are aligned by meetings: all stages leave a barrier at
nearly the same moment, and the median over several barriers of the difference in what their clocks then say is the offset.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from dist_llm.comm.collectives import barrier, gather_json
from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import RunConfig
from dist_llm.parallel.pipeline import Pipeline
from dist_llm.report.timeline import StepTimeline, TimedAction, append_timeline

__all__ = ["TimelineLog", "clock_offsets", "gather_timeline"]

_FIRST = 3  # step of an attempt: the first two pay for allocations and connections
_MEETINGS = 9


class TimelineLog:
    """Decides which steps are recorded: the third of an attempt, and those that ``log.timeline_every`` divides.

    Args:
        config: the run.
        ctx: where this rank stands.
        start_step: steps taken before this attempt.
    """

    def __init__(self, config: RunConfig, ctx: ParallelContext, *, start_step: int) -> None:
        self._path = Path(config.directory) / "timeline.jsonl"
        self._schedule = config.parallel.schedule
        self._every = config.log.timeline_every
        self._first = min(start_step + _FIRST, config.train.steps)
        self._ctx = ctx

    def after_step(self, step: int, pipeline: Pipeline | None) -> None:
        """Record the step just taken if it is one of those; every rank calls this.

        Raises:
            StorageError: the file cannot be written (main rank).
        """
        if pipeline is None or not (step == self._first or (self._every and step % self._every == 0)):
            return
        timeline = gather_timeline(pipeline, self._ctx, step=step, schedule=self._schedule)
        if timeline is not None and self._ctx.is_main:
            append_timeline(self._path, timeline)


def gather_timeline(pipeline: Pipeline, ctx: ParallelContext, *, step: int, schedule: str) -> StepTimeline | None:
    """The timeline of the pipeline's last run, on every stage of the main rank's pipeline; None on all other ranks.

    Args:
        pipeline: of this rank, after ``run``.
        ctx: where this rank stands.
        step: number of the step.
        schedule: its name.
    """
    if 0 not in ctx.pp.ranks:
        return None
    mine: dict[str, Any] = {
        "node": _node(),
        "spans": [[s.action.kind, s.action.micro, s.action.chunk, s.start, s.end] for s in pipeline.spans],
    }
    stages = gather_json(mine, ctx.pp, ctx.device)
    offsets, spread = [0.0] * ctx.pp.size, 0.0
    nodes = [stage["node"] for stage in stages]
    if len(set(nodes)) > 1:
        offsets, spread = clock_offsets(nodes, gather_json(_meet(ctx), ctx.pp, ctx.device))
    begin = min(start - offset for stage, offset in zip(stages, offsets, strict=True) for _, _, _, start, _ in stage["spans"])
    actions = [
        TimedAction(ctx.pp.ranks[number], number, kind, micro, chunk, start - offset - begin, end - offset - begin)
        for number, (stage, offset) in enumerate(zip(stages, offsets, strict=True))
        for kind, micro, chunk, start, end in stage["spans"]
    ]
    return StepTimeline(step, schedule, actions, spread)


def clock_offsets(nodes: Sequence[str], meetings: Sequence[Sequence[float]]) -> tuple[list[float], float]:
    """How far each stage's clock is ahead of the first stage's, and how much that estimate varied.

    Args:
        nodes: of each stage; stages of one node share a clock and get the same offset.
        meetings: what each stage's clock said when it left each meeting, seconds.

    Returns:
        the offset of each stage in seconds, and half the range of the middle half of the differences, the largest of all nodes.
    """
    # Of the ranks of a node the first to leave is the least delayed by whatever else the node does.
    left = {node: [min(times) for times in zip(*_of(node, nodes, meetings), strict=True)] for node in dict.fromkeys(nodes)}
    offsets: dict[str, float] = {}
    spread = 0.0
    for node, times in left.items():
        differences = sorted(there - here for there, here in zip(times, left[nodes[0]], strict=True))
        offsets[node] = median(differences)
        quarter = len(differences) // 4
        spread = max(spread, (differences[-1 - quarter] - differences[quarter]) / 2)
    return [offsets[node] for node in nodes], spread


def _of(node: str, nodes: Sequence[str], meetings: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    return [times for name, times in zip(nodes, meetings, strict=True) if name == node]


def _meet(ctx: ParallelContext) -> list[float]:
    times = []
    for _ in range(_MEETINGS):
        barrier(ctx.pp, ctx.device)
        times.append(time.perf_counter())
    return times


def _node() -> str:
    # Names the running kernel, whose clock it is: two containers of one machine share it, two machines never do.
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
