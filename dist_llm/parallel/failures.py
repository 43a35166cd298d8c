"""Which rank failed first, and where the others stood: one message from what the ranks left behind."""

from __future__ import annotations

import json
import linecache
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_llm.parallel.server import describe_status
from dist_llm.utils.errors import ExitCode, UserError

__all__ = ["RanksFailed", "Standing", "died_error", "hang_error", "read_standing"]

_TAIL_LINES = 20
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$')


class RanksFailed(UserError):
    """A rank raised, died or did not answer in time; all ranks are gone. ``rank`` is where it began.

    The first line names the rank and the cause; tracebacks, stacks and the end of the output follow.
    """

    exit_code = ExitCode.CHECK_FAILED

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True)
class Standing:
    """Where a rank stood at the deadline."""

    rank: int
    where: str  # one line
    stack: str = ""
    is_finished: bool = False
    is_stopped: bool = False
    is_waiting: bool = False  # in a collective: for others


def died_error(
    directory: Path, size: int, program: str, raised: Iterable[int], died: dict[int, int], finished: Iterable[int]
) -> RanksFailed:
    """From the ranks that raised, and those that died with their exit status.

    A rank that raised stays until it is killed, so it cannot have broken another's collectives; one that died can. So the dead come
    first, then the earliest exception.
    """
    errors = {rank: json.loads((directory / f"error-{rank}.json").read_text(encoding="utf-8")) for rank in raised}
    in_time = sorted(errors, key=lambda rank: errors[rank]["time"])
    also = []
    if died:
        rank = next(iter(died))  # in the order in which they were noticed
        when = "after it had answered" if rank in finished else "before it had answered"
        cause = f"rank {rank} of {size} {describe_status(died[rank])} {when}, in {program}"
        if died[rank] == -9:
            cause += " (if nobody killed it: the system was out of memory)"
        detail = _of_program(_read(directory / f"stacks-{rank}"))
        also += [f"rank {other} {describe_status(died[other])}" for other in died if other != rank]
    else:
        rank = in_time.pop(0)
        cause = f"rank {rank} of {size} raised {errors[rank]['error']}, in {program}"
        detail = errors[rank]["traceback"].strip()
    also += [f"rank {other} raised {_first_line(errors[other]['error'])}" for other in in_time]
    parts = [cause, detail, _tail(directory, rank)]
    if also:
        parts.append("then:\n" + _indent(also))
    return RanksFailed("\n".join(filter(None, parts)), rank=rank)


def hang_error(directory: Path, size: int, program: str, deadline_s: float, standings: Sequence[Standing]) -> RanksFailed:
    """From where each rank stood when the deadline passed."""
    # Most guilty first: who waits in a collective or has finished waits for somebody else.
    guilty = sorted(standings, key=lambda s: (not s.is_stopped, s.is_finished, s.is_waiting, s.rank))[0]
    finished = [s.rank for s in standings if s.is_finished]
    cause = f"rank {guilty.rank} of {size} had not answered after {deadline_s:g} s, in {program}: {guilty.where}"
    if guilty.is_waiting and finished:
        cause += f", while rank {', '.join(map(str, finished))} had finished"
    parts = [cause, "where each rank stood:", _indent(f"rank {s.rank}: {s.where}" for s in standings)]
    parts += [f"stacks of rank {s.rank}:\n{s.stack}" for s in standings if s.stack]
    parts += [_tail(directory, s.rank) for s in standings if not s.is_finished and not s.is_waiting]
    return RanksFailed("\n".join(filter(None, parts)), rank=guilty.rank)


def read_standing(rank: int, dump: str, *, is_stopped: bool, process_state: str) -> Standing:
    """From what faulthandler wrote for a rank (``dump``, may be empty) and its state in /proc (proc(5))."""
    prefix = "stopped by a signal (SIGSTOP), " if is_stopped else ""
    frames = _main_thread(dump)
    if not frames:
        return Standing(rank, f"{prefix}no stack could be read (process state {process_state})", _of_program(dump), is_stopped=is_stopped)
    collective = [frame["function"] for frame in frames if "/torch/distributed/" in frame["file"] and frame["function"] != "wrapper"]
    user = next((frame for frame in frames if "/torch/" not in frame["file"] and "/deepspeed/" not in frame["file"]), frames[0])
    place = f"{user['function']} ({user['file']}:{user['line']})"
    source = linecache.getline(user["file"], int(user["line"])).strip()
    if source:
        place += f": {source}"
    # A wait on an asynchronous collective is C++ and leaves no frame of torch.
    is_waiting = bool(collective) or bool(re.search(r"\.wait\(", source))
    what = f"waiting in {collective[-1]}, called by" if collective else "waiting in" if is_waiting else "in"
    return Standing(rank, f"{prefix}{what} {place}", _of_program(dump), is_stopped=is_stopped, is_waiting=is_waiting and not is_stopped)


def _of_program(dump: str) -> str:
    """The dump without the frames of the runner and of the server it was forked from, and without the list of extension modules."""
    kept = []
    is_runner = False
    for line in dump.split("\n"):
        frame = _FRAME.match(line)
        is_runner = frame is not None and (is_runner or frame["file"].endswith("rank_process.py"))
        if not is_runner and not line.startswith("Extension modules:"):
            kept.append(line)
    return "\n".join(kept).strip()


def _main_thread(dump: str) -> list[dict[str, str]]:
    """Frames of the thread that runs the program, innermost first."""
    blocks = [
        [m.groupdict() for line in block.splitlines() if (m := _FRAME.match(line))]
        for block in re.split(r"(?m)^(?=Current thread|Thread )", dump)
    ]
    return next((block for block in blocks if any(frame["file"].endswith("rank_process.py") for frame in block)), [])


def _tail(directory: Path, rank: int) -> str:
    lines = _read(directory / f"output-{rank}").rstrip().splitlines()
    if not lines:
        return ""
    which = f"last {_TAIL_LINES} of {len(lines)} lines" if len(lines) > _TAIL_LINES else "all"
    return f"output of rank {rank} ({which}):\n" + _indent(lines[-_TAIL_LINES:])


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else text


def _indent(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)
