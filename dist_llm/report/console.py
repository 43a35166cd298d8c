"""What a person who started a run sees: a live bar on a terminal, ``key=value`` lines everywhere else."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Console", "duration", "key_values"]

_REFRESH_S = 0.2  # a step may take a millisecond; the eye does not

# field: how its value is written. The order is that of the line.
_FORMATS = {
    "step": "d",
    "loss": ".4f",
    "bits_per_byte": ".4f",
    "lr": ".3e",
    "grad_norm": ".3f",
    "tokens": "d",
    "bytes": "d",
    "tokens_per_s": ".0f",
    "mfu": ".4f",
    "step_s": ".4f",
    "data_s": ".4f",
    "comm_s": ".4f",
    "comm_bytes": "d",
    "eval_s": ".2f",
    "memory_bytes": "d",
}


def duration(seconds: float) -> str:
    """A length of time as people say it: 9s, 4m05s, 2h03m, 3d04h."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def key_values(record: dict[str, Any]) -> str:
    """A metrics record as one line of ``key=value``, in a fixed order; fields without a number are left out."""
    numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
    parts = [f"{name}={numbers[name]:{form}}" for name, form in _FORMATS.items() if name in numbers]
    parts += [f"{name}={value}" for name, value in numbers.items() if name not in _FORMATS]
    return " ".join([str(record.get("kind", "train")), *parts])


class Console:
    """Shows the progress of a run.

    On a terminal there is one live bar. Elsewhere (a file, a pipe, a batch job's log) there is a line every
    ``every`` steps, and always one for the first and the last step. Evaluations are always shown.

    Args:
        total_steps: the step at which the run is complete.
        every: steps between lines where there is no terminal.
        stream: where to write; standard error if not given.
    """

    def __init__(self, total_steps: int, every: int, stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._every = every
        self._stream = stream if stream is not None else sys.stderr
        self._began: tuple[float, int] | None = None  # time and step of the first record
        self._unshown: dict[str, Any] | None = None
        self._eta_s = 0.0
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._refreshed = 0.0
        if self._stream.isatty():
            self._progress = self._bar()

    def _bar(self) -> Progress | None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        console = RichConsole(file=self._stream, highlight=False, markup=False)
        if console.is_dumb_terminal:
            return None
        return Progress(
            BarColumn(bar_width=24),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}", markup=False),
            TextColumn("eta {task.fields[eta]}", markup=False),
            console=console,
            auto_refresh=False,  # a refresh thread would take the interpreter lock from the training loop
        )

    def step(self, record: dict[str, Any]) -> None:
        """Show one metrics record, training or evaluation."""
        if record.get("kind") == "eval":
            self.note(key_values(record))
            return
        self._measure(record)
        if self._progress is not None:
            self._update_bar(self._progress, record)
            return
        step = record["step"]
        self._unshown = record
        if self._began is not None and (step == self._began[1] or step % self._every == 0 or step >= self._total):
            self._line(record)

    def _measure(self, record: dict[str, Any]) -> None:
        # Wall time per step since this process began, so that evaluations and checkpoints count; before there are
        # two records, the first step's own time.
        now, step = time.monotonic(), record["step"]
        if self._began is None:
            self._began = (now, step)
        began, first = self._began
        step_s = (now - began) / (step - first) if step > first else float(record.get("step_s") or 0.0)
        self._eta_s = step_s * max(0, self._total - step)

    def _line(self, record: dict[str, Any]) -> None:
        self._unshown = None
        self._write(f"{key_values(record)} total_steps={self._total} eta={duration(self._eta_s)}")

    def _update_bar(self, progress: Progress, record: dict[str, Any]) -> None:
        numbers = f"loss {record['loss']:.4f}"
        if record.get("bits_per_byte") is not None:
            numbers += f"  {record['bits_per_byte']:.3f} bits/byte"
        if record.get("tokens_per_s") is not None:
            numbers += f"  {record['tokens_per_s']:,.0f} tokens/s"
        fields: dict[str, Any] = {"numbers": numbers, "eta": duration(self._eta_s)}
        if self._task is None:
            progress.start()
            self._task = progress.add_task("", total=self._total, completed=record["step"], **fields)
        else:
            progress.update(self._task, completed=record["step"], **fields)
        now = time.monotonic()
        if now - self._refreshed >= _REFRESH_S or record["step"] >= self._total:
            self._refreshed = now
            progress.refresh()

    def note(self, text: str) -> None:
        """Show a sentence, above the bar where there is one."""
        if self._progress is not None:
            self._progress.console.print(text, soft_wrap=True)
        else:
            self._write(text)

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Show the last step if it has not been shown, and leave the terminal as it was."""
        if self._progress is not None:
            if self._task is not None:
                self._progress.refresh()
            self._progress.stop()
        elif self._unshown is not None:
            self._line(self._unshown)
