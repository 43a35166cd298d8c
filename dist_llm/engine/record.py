"""Who is told about the run: metrics.jsonl first, then console and mirrors. Only the main rank records."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from dist_llm.config.schema import RunConfig
from dist_llm.planning.count import count_params
from dist_llm.report.console import Console
from dist_llm.report.metrics import EventLog, MetricsWriter, cut_after
from dist_llm.report.mirrors import open_mirrors

__all__ = ["NullRecorder", "Recorder", "RunRecorder"]


class Recorder(Protocol):
    """Where the loop says what happens."""

    def note(self, text: str) -> None:
        """A sentence for the person who watches."""
        ...

    def metrics(self, record: dict[str, Any]) -> None:
        """One record, see ``report.metrics``."""
        ...

    def event(self, event: str, **fields: Any) -> None:
        """Something that happened to the run."""
        ...

    def close(self) -> None:
        """Flush everything."""
        ...


class NullRecorder:
    """The recorder of all ranks but the main one."""

    def note(self, text: str) -> None:
        """Nothing."""

    def metrics(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def event(self, event: str, **fields: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class RunRecorder:
    """The recorder of the main rank.

    Opening it cuts metrics.jsonl after ``start_step``: those steps are about to be taken, and written, again.
    """

    def __init__(self, run_dir: Path, config: RunConfig, *, start_step: int, attempt: int) -> None:
        self._console = Console(config.train.steps, config.log.every)
        self._events = EventLog(run_dir / "events.jsonl")
        removed = cut_after(run_dir / "metrics.jsonl", start_step)
        self._writer = MetricsWriter(run_dir / "metrics.jsonl")
        self._mirrors = open_mirrors(
            run_dir,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            project=config.log.wandb_project,
            name=config.name,
            config=config.model_dump(mode="json"),
            note=self.note,
        )
        if start_step or removed or attempt > 1:
            self._mirrors.resumed(start_step)
            self._events.write("resume", step=start_step, attempt=attempt, records_cut=removed)
        else:
            self._events.write("start", attempt=attempt, params=count_params(config.model).total)

    def note(self, text: str) -> None:
        """See ``Recorder``."""
        self._console.note(text)

    def metrics(self, record: dict[str, Any]) -> None:
        """See ``Recorder``; the file first."""
        self._writer.write(record)
        self._console.step(record)
        self._mirrors.log(record)

    def event(self, event: str, **fields: Any) -> None:
        """See ``Recorder``."""
        self._events.write(event, **fields)

    def close(self) -> None:
        """See ``Recorder``."""
        self._console.close()
        self._mirrors.close()
        self._writer.close()
