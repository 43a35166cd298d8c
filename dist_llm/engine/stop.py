"""Signals become a wish that the ranks agree on at the next step boundary.

SIGTERM and SIGUSR1 (time limit, pre-emption) ask for a save and exit 75; Ctrl-C for a save and exit 130. Launchers add noise:
they forward a Ctrl-C that the terminal has already delivered, and follow it with SIGTERM. Neither is a second wish. A second
Ctrl-C of a person, at least a second later, stops at once.

Signals are read by a thread from a wake-up descriptor: Python runs its own handlers only when the main thread returns to the
interpreter, which a rank that hangs in a collective never does.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from dist_llm.utils.errors import ExitCode

__all__ = ["StopFlag"]

SAME_PRESS_S = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """What the signals so far ask for; a context manager, or for good with ``install``.

    ``at_once`` is called, in the reading thread, when a second Ctrl-C ends the process right away.
    """

    def __init__(self) -> None:
        self.at_once: Callable[[], None] | None = None
        self._code = 0
        self._interrupted_at: float | None = None
        self._old_handlers: dict[int, object] = {}
        self._read_fd, self._write_fd = -1, -1
        self._old_wakeup = -1

    @property
    def code(self) -> int:
        """0, or the exit code asked for: 75 (requeue) or 130 (interrupted)."""
        return self._code

    def __enter__(self) -> StopFlag:
        self.install()
        return self

    def install(self) -> None:
        """Catch the signals from here on; for a process whose only job is the run, to its very end."""
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        for number in _SIGNALS:
            self._old_handlers[number] = signal.signal(number, _ignore_in_python)
        self._old_wakeup = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(self._read_fd,), name="signals", daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        del kind, value, traceback
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave, it takes back
        os.close(self._write_fd)  # the thread reads the end of the pipe, and ends

    def received(self, number: int, now: float) -> None:
        """Note one signal that arrived at monotonic time ``now`` (seconds)."""
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at >= SAME_PRESS_S:
                if self.at_once is not None:
                    self.at_once()
                os._exit(ExitCode.INTERRUPTED)
            if self._interrupted_at is None:
                self._interrupted_at = now
                self._code = ExitCode.INTERRUPTED  # also after a SIGTERM: the person at the keyboard is not asking to be requeued
        elif self._code == 0:
            self._code = ExitCode.REQUEUE

    def _read(self, fd: int) -> None:
        while data := os.read(fd, 64):
            for number in data:
                self.received(number, time.monotonic())
        os.close(fd)


def _ignore_in_python(number: int, frame: FrameType | None) -> None:
    # A Python-level handler must exist for the wake-up descriptor to be written; the thread does the work.
    del number, frame
