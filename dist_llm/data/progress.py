"""How far long work has come, on stderr: a live bar on a terminal, a ``key=value`` line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

__all__ = ["ConsoleProgress", "Progress", "SilentProgress"]

LINE_EVERY_S = 5.0


class Progress(Protocol):
    """What work reports to. ``total`` is in the unit of ``done`` (here: bytes of text)."""

    def phase(self, name: str, total: int | None) -> None:
        """A new stage of the work begins."""

    def update(self, done: int) -> None:
        """So much of the stage is done."""

    def note(self, message: str) -> None:
        """One line that stays."""

    def close(self) -> None:
        """The work has ended, well or not."""


class SilentProgress:
    """Reports nothing."""

    def phase(self, name: str, total: int | None) -> None:
        """Say nothing."""

    def update(self, done: int) -> None:
        """Say nothing."""

    def note(self, message: str) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Nothing is open."""


class ConsoleProgress:
    """Reports to stderr."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._name = ""
        self._total: int | None = None
        self._next_line = 0.0
        self._started = 0.0
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()

    def phase(self, name: str, total: int | None) -> None:
        """A new stage begins."""
        self._name, self._total = name, total
        self._started = time.monotonic()
        self._next_line = self._started + LINE_EVERY_S
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(name, total=total)

    def update(self, done: int) -> None:
        """Move the bar, or print a line when the last one is old enough."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
            return
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + LINE_EVERY_S
            total = f" total_bytes={self._total}" if self._total else ""
            print(f"phase={self._name} done_bytes={done}{total} elapsed_s={now - self._started:.0f}", file=sys.stderr, flush=True)

    def note(self, message: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
