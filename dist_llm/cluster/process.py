"""Processes of this machine as the kernel sees them: alive, stopped or dead. Everything is asked of /proc.

/proc answers from memory, at once and truthfully: no slow file system can make a live process look dead. A process number alone
is no name, because the kernel uses it again; together with the time the process started it is one (proc_pid_stat(5)).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

__all__ = ["Process", "Sight", "State", "describe_status", "kill", "look_at", "open_pidfd", "this_process"]

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """One process, told apart from any other that has or had its number."""

    host: str
    machine: str  # boot id and process-number namespace: only processes that share both can look at one another
    pid: int
    started: int  # clock ticks after boot


class State(Enum):
    """What a look at a process finds."""

    RUNNING = "running"
    STOPPED = "stopped"  # by a signal. A debugger's stop does not count: somebody is looking at it, and wants it alive
    DEAD = "dead"


@dataclass(frozen=True)
class Sight:
    """The answer of ``look_at``."""

    state: State
    status: int | None = None  # wait status of a dead process, as long as its parent has not collected it


def this_process() -> Process:
    """The calling process."""
    boot = (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    pid = os.getpid()
    fields = _stat_fields(pid)
    assert fields is not None, "a process that runs has a /proc entry"
    return Process(host=socket.gethostname(), machine=f"{boot} {(PROC / 'self/ns/pid').readlink()}", pid=pid, started=int(fields[_STARTED]))


def look_at(process: Process) -> Sight:
    """How ``process``, which is or was on this machine, is doing now."""
    fields = _stat_fields(process.pid)
    if fields is None or int(fields[_STARTED]) != process.started:
        return Sight(State.DEAD)
    letter = fields[_STATE]
    if letter in ("Z", "X", "x"):
        return Sight(State.DEAD, status=int(fields[_EXIT_CODE]))
    return Sight(State.STOPPED if letter == "T" else State.RUNNING)


def kill(process: Process) -> bool:
    """SIGKILL ``process``, stopped or not; False when it is dead already or not ours to kill."""
    if look_at(process).state is State.DEAD:
        return False
    try:
        os.kill(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def open_pidfd(process: Process) -> int | None:
    """A descriptor that polls as readable once ``process`` is dead; None where the kernel has none (before Linux 5.3)."""
    with contextlib.suppress(OSError):
        return os.pidfd_open(process.pid)
    return None


def describe_status(status: int | None) -> str:
    """The end of a process in words that follow its name: "was killed by signal 9 (SIGKILL)"."""
    if status is None:
        return "ended without a word (killed or crashed; its parent has collected how)"
    number = os.WTERMSIG(status)
    if number:
        try:
            name = signal.Signals(number).name
        except ValueError:  # a real-time signal
            return f"was killed by signal {number}"
        return f"was killed by signal {number} ({name})"
    return f"ended with exit code {os.WEXITSTATUS(status)} without a word"


# Positions in /proc/PID/stat after the name in parentheses, which may itself hold spaces and parentheses.
_STATE, _STARTED, _EXIT_CODE = 0, 19, 49


def _stat_fields(pid: int) -> list[str] | None:
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()
