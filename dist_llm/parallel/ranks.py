"""A distributed program on the ranks of one machine, as a function call.

    answers = run_on_ranks(program, tp=2, dp=2, args=(config,))

runs ``program(ctx, config)`` on four forked CPU ranks over gloo and returns what each returned. The ranks come from a fork server
that has imported torch, so a call costs what the forks and the meeting cost, not the imports; the first call of a process starts the
server. Whatever happens - an exception, a killed or stopped rank, a deadline, Ctrl-C, the death of the caller - no rank is left.
"""

from __future__ import annotations

import json
import math
import os
import select
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from signal import SIGCONT, SIGKILL
from typing import Any

from dist_llm.parallel.failures import RanksFailed, Standing, died_error, hang_error, read_standing
from dist_llm.parallel.rank_process import DUMP_SIGNAL
from dist_llm.parallel.server import ForkServer
from dist_llm.parallel.transport import load_value, save_value
from dist_llm.utils.errors import LaunchError

__all__ = ["RanksFailed", "run_on_ranks"]

_SETTLE_S = 0.3  # after a first failure: a death is reported a moment after the broken collectives that it causes
_DUMP_LIMIT_S = 2.0
_LEAVE_LIMIT_S = 20.0
_ECHO_EVERY_S = 0.1


def run_on_ranks(
    program: Callable[..., Any],
    *,
    tp: int = 1,
    cp: int = 1,
    dp: int = 1,
    pp: int = 1,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    deadline_s: float = 120.0,
    threads: int = 1,
    kv_heads: int | None = None,
    echo: bool = False,
) -> list[Any]:
    """Run ``program(ctx, *args, **kwargs)`` on tp x cp x dp x pp ranks of this machine; what each rank returned, in rank order.

    Args:
        program: a function at the top level of an importable module (not ``__main__``: ranks import it by name).
        tp, cp, dp, pp: sizes of the axes.
        args, kwargs: arguments after the ``ParallelContext``. They and the answers travel between processes: plain values,
            importable classes, tensors (by value, see ``transport``).
        deadline_s: seconds for the whole call, once the fork server is up.
        threads: CPU threads of each rank.
        kv_heads: for the context's ``kv`` group, see ``build_context``.
        echo: pass the ranks' output on to stdout, each line with its rank. Otherwise it is shown only when they fail.

    Ranks see the caller's directory, import path and environment, but no CUDA device. Calls from several threads take turns.

    Raises:
        RanksFailed: a rank raised, died, or had not answered when the deadline passed.
        LaunchError: the fork server did not start or died.
        ValueError: the program cannot be imported by name, or a size or limit makes no sense.
    """
    sizes = {"tp": tp, "cp": cp, "dp": dp, "pp": pp}
    for name, value in (*sizes.items(), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not deadline_s > 0:
        raise ValueError(f"deadline_s is {deadline_s}; it must be more than 0 seconds")
    module, name = _importable_name(program)
    with _SERVER.lock, tempfile.TemporaryDirectory(prefix="dist_llm-ranks-") as temporary:
        directory = Path(temporary)
        call = {
            "module": module,
            "program": name,
            "sizes": sizes,
            "threads": threads,
            "kv_heads": kv_heads,
            "deadline_s": deadline_s,
            "sys_path": [str(Path(p).absolute()) for p in sys.path],
            "cwd": str(Path.cwd()),
            "environ": dict(os.environ),
        }
        (directory / "call.json").write_text(json.dumps(call), encoding="utf-8")
        save_value((tuple(args), dict(kwargs or {})), directory / "arguments")
        server = _SERVER.get()
        try:
            supervisor = _Supervisor(server, directory, math.prod(sizes.values()), f"{module}.{name}", deadline_s, echo)
            supervisor.run()
        except RanksFailed:
            raise  # all ranks are gone, the server is as good as before
        except BaseException:
            server.stop()  # Ctrl-C, a dead server: it takes its ranks along, the next call starts another
            raise
        return [load_value(directory / f"answer-{rank}") for rank in range(supervisor.size)]


def _importable_name(program: Callable[..., Any]) -> tuple[str, str]:
    module, name = getattr(program, "__module__", None), getattr(program, "__qualname__", None)
    if module is None or name is None:
        raise ValueError(f"{program!r} has no name to import it by; give a top-level function of a module")
    if module == "__main__":
        raise ValueError(f"{name} is defined in the script that runs, which ranks cannot import; move it to a module of its own")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not program:
        raise ValueError(f"importing {name} from {module} does not give this function; ranks need a top-level function of a module")
    return module, name


class _Holder:
    """The fork server of this process: the imports are paid once, so it outlives the call."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._server: ForkServer | None = None

    def get(self) -> ForkServer:
        """A running one."""
        if self._server is not None and self._server.owner != os.getpid():
            self._server.abandon()  # this process was forked from the owner
            self._server = None
        if self._server is None or not self._server.is_alive():
            self._server = ForkServer()
        return self._server


_SERVER = _Holder()
os.register_at_fork(after_in_child=lambda: setattr(_SERVER, "lock", threading.Lock()))  # it may have been held by a thread that is not here


class _Supervisor:
    """One call: starts the ranks, follows them, and returns from ``run`` only when all are gone or the server cannot be trusted."""

    def __init__(self, server: ForkServer, directory: Path, size: int, program: str, deadline_s: float, echo: bool) -> None:
        self.size = size
        self._server = server
        self._directory = directory
        self._program = program
        self._deadline_s = deadline_s
        self._pids: dict[int, int] = {}
        self._done: set[int] = set()
        self._raised: set[int] = set()
        self._died: dict[int, int] = {}  # rank -> exit status, negative for a signal
        self._partial = b""
        self._echo = _Echo(directory, size) if echo else None

    def run(self) -> None:
        """Until every rank has written its answer and left."""
        self._notices, notices = os.pipe()
        leave, self._leave = os.pipe()
        try:
            self._server.run(self._directory, self.size, notices, leave)
            os.close(notices)
            os.close(leave)
            self._follow()
        finally:
            os.close(self._notices)
            os.close(self._leave)

    def _follow(self) -> None:
        self._pump(self._deadline_s, lambda: len(self._done) == self.size or self._has_failed())
        if len(self._done) == self.size:
            os.write(self._leave, bytes(self.size))  # a byte for each rank
            self._pump(_LEAVE_LIMIT_S, lambda: len(self._died) == self.size)
            if len(self._died) == self.size and not self._lost():
                return
        if self._has_failed():
            self._pump(_SETTLE_S, lambda: len(self._raised) + len(self._lost()) == self.size)
            lost = self._lost()
            self._end_ranks()
            raise died_error(self._directory, self.size, self._program, self._raised, lost, self._done)
        standings = self._where_ranks_stand()
        self._end_ranks()
        raise hang_error(self._directory, self.size, self._program, self._deadline_s, standings)

    def _lost(self) -> dict[int, int]:
        """Ranks that ended otherwise than by answering and leaving."""
        return {rank: status for rank, status in self._died.items() if status != 0 or rank not in self._done}

    def _has_failed(self) -> bool:
        return bool(self._raised or self._lost())

    def _alive(self) -> list[int]:
        return [rank for rank in self._pids if rank not in self._died]

    def _pump(self, limit_s: float, is_over: Callable[[], bool]) -> None:
        """Listen to the ranks until ``is_over()`` or for ``limit_s``."""
        end = time.monotonic() + limit_s
        while not is_over() and (left := end - time.monotonic()) > 0:
            self._listen(min(left, _ECHO_EVERY_S) if self._echo else left)
        if self._echo:
            self._echo.pass_on()

    def _listen(self, limit_s: float) -> None:
        readable = select.select([self._notices, self._server.fileno()], [], [], limit_s)[0]
        if self._echo:
            self._echo.pass_on()
        if self._notices in readable:
            self._partial += os.read(self._notices, 1 << 16)
            *lines, self._partial = self._partial.split(b"\n")
            for line in lines:
                self._note(*line.decode().split(" "))
        # Only after its last words: a pipe keeps what a dead process wrote.
        elif self._server.fileno() in readable:
            raise LaunchError(f"the process that forks ranks died, and they with it, in {self._program}: it {self._server.why_dead()}")

    def _note(self, rank: str, what: str, value: str = "") -> None:
        if what == "born":
            self._pids[int(rank)] = int(value)
        elif what == "died":
            self._died[int(rank)] = int(value)
        elif what == "done":
            self._done.add(int(rank))
        else:
            assert what == "raised", f"a notice of kind {what}"
            self._raised.add(int(rank))

    def _end_ranks(self) -> None:
        """Kill those that live; if they do not go, neither does the server stay."""
        self._server.signal(self._alive(), SIGKILL)
        self._pump(_LEAVE_LIMIT_S, lambda: len(self._died) == self.size)
        if len(self._died) < self.size:
            self._server.stop()

    def _where_ranks_stand(self) -> list[Standing]:
        """Have every rank that is not finished write its stacks, and read them."""
        working = [rank for rank in self._alive() if rank not in self._done]
        states = {rank: _process_state(self._pids[rank]) for rank in working}
        self._server.signal(working, DUMP_SIGNAL)
        # A stopped process sees no signal but this one and SIGKILL.
        self._server.signal([rank for rank in working if states[rank] == "T"], SIGCONT)
        paths = {rank: self._directory / f"stacks-{rank}" for rank in working}
        sizes: dict[int, int] = {}

        def are_written() -> bool:
            nonlocal sizes
            before, sizes = sizes, {rank: path.stat().st_size if path.exists() else 0 for rank, path in paths.items()}
            return all(sizes.values()) and sizes == before

        end = time.monotonic() + _DUMP_LIMIT_S
        while not are_written() and time.monotonic() < end:
            time.sleep(0.05)
        standings = [
            read_standing(
                rank,
                path.read_text(encoding="utf-8", errors="replace") if path.exists() else "",
                is_stopped=states[rank] == "T",
                process_state=states[rank],
            )
            for rank, path in paths.items()
        ]
        standings += [Standing(rank, "finished", is_finished=True) for rank in self._done]
        # A rank that the server had no time to fork before the deadline.
        standings += [Standing(rank, "not started yet") for rank in range(self.size) if rank not in self._pids]
        return sorted(standings, key=lambda standing: standing.rank)


class _Echo:
    """Passes on whole lines that the ranks have written since the last time."""

    def __init__(self, directory: Path, size: int) -> None:
        self._paths = [directory / f"output-{rank}" for rank in range(size)]
        self._read = [0] * size

    def pass_on(self) -> None:
        for rank, path in enumerate(self._paths):
            if not path.exists():
                continue
            with open(path, "rb") as f:
                f.seek(self._read[rank])
                whole = f.read()
            whole = whole[: whole.rfind(b"\n") + 1]
            self._read[rank] += len(whole)
            for line in whole.decode("utf-8", errors="replace").splitlines():
                print(f"rank {rank}: {line}", flush=True)


def _process_state(pid: int) -> str:
    """One letter, as proc(5) has it: R running, S sleeping, D in the kernel, T stopped, Z ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "Z"
    return stat.rpartition(")")[2].split()[0]  # the name before it may hold anything
