"""``timeline.jsonl``: when each stage of a pipeline computed what, one line a recorded step.

A line is whole or not there (report/jsonl.py). A run that resumes takes steps again and appends; of two lines of one step the
later one counts. Seconds count from the first action of the step, on a clock common to all stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_llm.report.jsonl import append_line, open_lines, read_lines
from dist_llm.topology.schedule import bubble_fraction
from dist_llm.utils.errors import DataError

__all__ = ["StepTimeline", "TimedAction", "append_timeline", "read_timelines"]


@dataclass(frozen=True)
class TimedAction:
    """One forward (F) or backward (B) of one micro-batch through one chunk of a stage."""

    rank: int  # in the world
    stage: int
    kind: str
    micro: int
    chunk: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class StepTimeline:
    """One pipeline in one step.

    ``clock_spread_s`` says how far apart the nodes' clocks may still be after they were aligned; 0 on one node.
    """

    step: int
    schedule: str
    actions: Sequence[TimedAction]
    clock_spread_s: float = 0.0

    @property
    def num_stages(self) -> int:
        """Ranks of the pipeline."""
        return 1 + max(a.stage for a in self.actions)

    @property
    def num_micro(self) -> int:
        """Micro-batches of the step."""
        return 1 + max(a.micro for a in self.actions)

    @property
    def num_chunks(self) -> int:
        """Parts of the model that each rank holds."""
        return 1 + max(a.chunk for a in self.actions)

    @property
    def makespan_s(self) -> float:
        """From the start of the first action to the end of the last."""
        return max(a.end_s for a in self.actions) - min(a.start_s for a in self.actions)

    @property
    def bubble(self) -> float:
        """Part of stages x makespan in which no stage computes; 0 for a step that takes no time."""
        whole = self.num_stages * self.makespan_s
        return 1.0 - sum(a.end_s - a.start_s for a in self.actions) / whole if whole > 0 else 0.0

    @property
    def bubble_theory(self) -> float:
        """The same with stages of equal cost and messages that take no time: (p - 1) / (v m + p - 1)."""
        return bubble_fraction(self.num_stages, self.num_micro, self.num_chunks)


def append_timeline(path: Path, timeline: StepTimeline) -> None:
    """Add a step to the file.

    Raises:
        StorageError: the disk is full or refuses.
    """
    record = {
        "step": timeline.step,
        "schedule": timeline.schedule,
        # For whoever reads the file without this package; the reader below computes them again.
        "bubble": round(timeline.bubble, 6),
        "bubble_theory": round(timeline.bubble_theory, 6),
        "clock_spread_s": round(timeline.clock_spread_s, 7),
        "actions": [asdict(a) | {"start_s": round(a.start_s, 7), "end_s": round(a.end_s, 7)} for a in timeline.actions],
    }
    with open_lines(path) as f:
        append_line(f, record)


def read_timelines(path: Path) -> list[StepTimeline]:
    """Every recorded step, by step; a torn last line is skipped, and a file that is not there has none.

    Raises:
        DataError: a whole line is no timeline.
    """
    found: dict[int, StepTimeline] = {}
    for number, record in enumerate(read_lines(path), start=1):
        try:
            timeline = _timeline_of(record)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}, record {number}: not the timeline of a step ({reason}); remove the line, or the file") from error
        found[timeline.step] = timeline
    return [found[step] for step in sorted(found)]


def _timeline_of(record: dict[str, Any]) -> StepTimeline:
    actions = [
        TimedAction(
            rank=int(a["rank"]),
            stage=int(a["stage"]),
            kind=str(a["kind"]),
            micro=int(a["micro"]),
            chunk=int(a["chunk"]),
            start_s=float(a["start_s"]),
            end_s=float(a["end_s"]),
        )
        for a in record["actions"]
    ]
    if not actions:
        raise ValueError("it has no actions")
    if any(min(a.stage, a.micro, a.chunk) < 0 or a.end_s < a.start_s or a.kind not in ("F", "B") for a in actions):
        raise ValueError("an action needs a stage, micro and chunk of at least 0, a kind F or B, and an end after its start")
    return StepTimeline(int(record["step"]), str(record["schedule"]), actions, float(record["clock_spread_s"]))
