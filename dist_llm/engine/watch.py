"""A thread in each rank that notices when another rank dies, stops or fails, and ends this one in time.

A rank that waits in a collective for a rank that will never come cannot help itself: the main thread is inside gloo or NCCL. The
thread is not, because both let go of the interpreter. It looks at the ranks of its own machine through /proc, and at the run
directory for what any rank, on any machine, has said (``cluster/health.py``). When something has failed,

    1. all agree on the first cause: the first one to write it down is right,
    2. each says that it is leaving, and the silent ones of each machine (stopped, or stuck so that not even their thread runs) are
       killed by the others: a launcher would wait half a minute for each of them,
    3. the main threads, whose collectives break, end by themselves; one that does not is ended by its watcher.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from dist_llm.cluster.exit_file import write_exit
from dist_llm.cluster.health import Beat, Failure, HealthDir
from dist_llm.cluster.process import Process, State, describe_status, kill, look_at, open_pidfd, this_process
from dist_llm.comm.collectives import gather_json
from dist_llm.comm.context import ParallelContext
from dist_llm.utils.errors import ExitCode, StorageError

__all__ = ["Watch"]

LOOK_S = 0.25  # between two looks at the processes of this machine; a death wakes the thread at once where there are pidfds
STOPPED_S = 5.0  # a process may be stopped for so long and go on (a person's Ctrl-Z and fg)
JUMP_S = 2.0  # a look that comes so late says that this process was stopped itself
ECHO_S = 5.0  # a broken collective waits so long for its cause to be written down, perhaps on another machine
LEAVING_S = 3.0  # ranks of one machine have so long to say that they are leaving
MAIN_S = 3.0  # the main thread has so long to notice that its collective broke
GONE_S = 6.0  # the last rank of a machine waits so long for the others to be gone
CLOSE_S = 5.0  # and a main thread has so long to close files and groups
RANKS_PER_SECOND = 256  # of a whole run that touch the shared run directory: file servers have other work


class Watch:
    """This rank's eye on the others. Alone, it sees nothing and starts nothing.

    After ``first_cause`` the process is expected to end within seconds, and is ended if it does not.

    Args:
        health: of this attempt, made by the main rank.
        ctx: where this rank stands.
        progress: its "step" is the number of optimiser steps done.

    Raises:
        StorageError: this rank cannot write into the run directory.
    """

    def __init__(self, health: HealthDir, run_dir: Path, ctx: ParallelContext, progress: dict[str, Any]) -> None:
        self._health, self._run_dir, self._progress = health, run_dir, progress
        self._rank = ctx.world.rank
        self._size = ctx.world.size
        self._me = this_process()
        self._peers: dict[int, Process] = {}  # of this machine, by rank
        self._stopped_since: dict[int, float] = {}
        self._verdict: Failure | None = None
        self._lock = threading.RLock()  # both threads look; one finds
        self._settled = threading.Event()  # the main thread knows
        self._wound_up = threading.Event()  # the silent ones have been dealt with
        self._done = False
        self._is_written = True  # the failure this rank claimed
        self._is_agreed = False  # the main thread ends by what all ranks were told
        self._looked_at = time.monotonic()
        self._step, self._step_at = progress["step"], time.monotonic()
        self._wake_fd = -1
        # Many ranks share one file server, so each asks it the less often the more there are.
        self._shared_s = max(0.5, self._size / RANKS_PER_SECOND)
        self._leaving_s = LEAVING_S + 2 * self._shared_s
        if self._size > 1:
            self._beat_now()

    def start(self, ctx: ParallelContext) -> None:
        """Learn who the others are, a collective call, and begin to watch."""
        if self._size == 1:
            return
        # Whoever is looked at has announced itself before: the gathering is also the moment from which absence means something.
        everyone = [Process(**record) for record in gather_json(asdict(self._me), ctx.world, ctx.device)]
        self._peers = {r: p for r, p in enumerate(everyone) if p.machine == self._me.machine and r != self._rank}
        read_fd, self._wake_fd = os.pipe()
        threading.Thread(target=self._run, args=(read_fd,), name="watch", daemon=True).start()

    def leave(self) -> None:
        """This rank ends in order: not to be taken for dead, and done with watching."""
        if self._size == 1:
            return
        with self._lock:
            self._done = True
            self._health.leave(self._rank)
        self._wake()

    def claim(self, failure: Failure) -> Failure:
        """Write ``failure`` down as the reason why the run ends; returns the first reason, which may be another rank's."""
        with self._lock:
            if self._verdict is None:
                self._verdict = failure
                if self._size > 1:
                    try:
                        self._verdict = self._health.claim(failure)
                    except StorageError as error:  # a full disk: the others see this process die, and its exit code
                        self._is_written = False
                        print(f"dist-llm train: {error}", file=sys.stderr, flush=True)
            return self._verdict

    def first_cause(self, own: Failure | Callable[[], Failure], *, is_echo: bool, is_agreed: bool) -> Failure:
        """Why the run ends, now that this rank's main thread has an exception: ``own``, or what failed first elsewhere.

        Args:
            own: this rank's own failure; called, if it is a function, only when nobody failed before.
            is_echo: the exception may be the consequence of a failure that is still being written down.
            is_agreed: the exception is for a person, and where it is not the first cause all ranks have been told the same.
        """
        self._is_agreed = is_agreed
        deadline = time.monotonic() + (max(ECHO_S, 3 * self._shared_s) if is_echo and self._size > 1 else 0)
        while (verdict := self._look(shared_now=True)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if verdict is None:
            verdict = self.claim(own() if callable(own) else own)
        if self._size == 1:
            self._say_in_exit_file(verdict)
            return verdict
        self._settled.set()
        self._wake()
        self._wound_up.wait(self._leaving_s + 2)
        if self.repeats(verdict):
            self._wait_for_the_others()
        return verdict

    def repeats(self, failure: Failure) -> bool:
        """Whether this rank prints ``failure`` of another one as the last line: the lowest of each machine that left knowingly."""
        if failure.teller == self._rank or self._is_agreed:
            return False
        return not any(r < self._rank and r != failure.teller and self._health.has_left(r) for r in self._peers)

    def seconds_since_step(self) -> float:
        """Since when no step was taken, to the second."""
        return time.monotonic() - self._step_at

    def beats(self) -> dict[int, Beat]:
        """How far each rank had come when it last said so."""
        return self._health.beats()

    # -- the thread -------------------------------------------------------------------------------------------------------------

    def _run(self, read_fd: int) -> None:
        poll = select.poll()
        poll.register(read_fd, select.POLLIN)
        pidfds = {fd: rank for rank, peer in self._peers.items() if (fd := open_pidfd(peer)) is not None}
        for fd in pidfds:
            poll.register(fd, select.POLLIN)
        last_beat, next_shared = time.monotonic(), 0.0
        while not self._done:
            for fd, _ in poll.poll(LOOK_S * 1000):
                poll.unregister(fd)  # a dead process stays readable, and the wake-up comes once
            now = time.monotonic()
            if self._step != self._progress["step"]:
                self._step, self._step_at = self._progress["step"], now
            shared = now >= next_shared
            if shared:
                next_shared = now + self._shared_s
            if self._done or self._look(shared_now=shared) is not None:
                break
            if now - last_beat >= max(1.0, 2 * self._shared_s):
                last_beat = now
                # A full disk fails the checkpoint and is said there; a beat that cannot be written is not worth a run.
                with contextlib.suppress(StorageError):
                    self._beat_now()
        if not self._done and self._verdict is not None:
            self._end(self._verdict)

    def _end(self, verdict: Failure) -> None:
        if self._is_written:
            self._health.leave(self._rank)
        deadline = time.monotonic() + self._leaving_s
        while (silent := self._silent()) and time.monotonic() < deadline:
            if verdict.rank in silent and look_at(self._peers[verdict.rank]).state is State.STOPPED:
                kill(self._peers[verdict.rank])
            time.sleep(0.05)
        for rank in silent:
            kill(self._peers[rank])
        if verdict.teller == self._rank or self.repeats(verdict):
            self._say_in_exit_file(verdict)
        self._wound_up.set()
        if self._settled.wait(MAIN_S):
            # The last one of a machine waits for the others before it closes.
            time.sleep(CLOSE_S + (GONE_S if self.repeats(verdict) else 0))
        repeats = self.repeats(verdict)
        if repeats:
            self._wait_for_the_others()
        if repeats or verdict.teller == self._rank:
            print(f"dist-llm train: {verdict.reason}; all ranks stop", file=sys.stderr, flush=True)
        os._exit(verdict.code)

    # -- what both threads do ---------------------------------------------------------------------------------------------------

    def _look(self, *, shared_now: bool) -> Failure | None:
        """The first failure of the attempt as far as it can be seen from here, written down if nobody had."""
        with self._lock:
            if self._verdict is None and self._size > 1:
                if shared_now:
                    self._verdict = self._health.first_failure()
                if self._verdict is None and (found := self._look_at_peers()) is not None:
                    self.claim(found)
            return self._verdict

    def _look_at_peers(self) -> Failure | None:
        now = time.monotonic()
        if now - self._looked_at > JUMP_S:
            # Ctrl-Z stops this rank with the others: whoever wakes first must not hold their sleep against them.
            self._stopped_since.clear()
        self._looked_at = now
        for rank, peer in self._peers.items():
            sight = look_at(peer)
            if sight.state is not State.STOPPED:
                self._stopped_since.pop(rank, None)
            if sight.state is State.DEAD and not self._health.has_left(rank):
                # It may have written its reason just before it went.
                return self._health.first_failure() or self._silent_failure(rank, describe_status(sight.status), sight.status)
            if sight.state is State.STOPPED and now - self._stopped_since.setdefault(rank, now) >= STOPPED_S:
                return self._silent_failure(rank, f"has been stopped by a signal for {STOPPED_S:.0f} s", None, code=ExitCode.HANG)
        return None

    def _silent_failure(self, rank: int, what: str, status: int | None, code: int = ExitCode.CHECK_FAILED) -> Failure:
        left_with = os.WEXITSTATUS(status) if status is not None and os.WIFEXITED(status) else 0
        if left_with in set(ExitCode) - {ExitCode.DONE}:
            code = left_with  # it had a reason, and could not write it down
        peer, step = self._peers[rank], self._progress["step"]
        reason = f"rank {rank} on {peer.host} (pid {peer.pid}) {what} at step {step}"
        return Failure(code=int(code), reason=reason, rank=rank, host=peer.host, step=step)

    def _silent(self) -> list[int]:
        """Ranks of this machine that live and have not said that they are leaving."""
        return [r for r, p in self._peers.items() if not self._health.has_left(r) and look_at(p).state is not State.DEAD]

    def _wait_for_the_others(self) -> None:
        deadline = time.monotonic() + GONE_S
        while alive := [p for p in self._peers.values() if look_at(p).state is not State.DEAD]:
            if time.monotonic() > deadline:
                for peer in alive:
                    kill(peer)
                break
            time.sleep(0.05)

    def _say_in_exit_file(self, failure: Failure) -> None:
        try:
            write_exit(
                self._run_dir,
                code=failure.code,
                reason=failure.reason,
                rank=failure.rank,
                host=failure.host,
                step=failure.step,
                traceback=failure.traceback,
                attempt=self._progress["attempt"],
            )
        except StorageError as second:  # a full disk must not hide the first cause
            print(f"dist-llm train: {second}", file=sys.stderr, flush=True)

    def _beat_now(self) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        where, waits = _where(frame)
        with self._lock:
            if not self._done and self._verdict is None:
                step = self._progress["step"]
                self._health.beat(Beat(rank=self._rank, host=self._me.host, pid=self._me.pid, step=step, where=where, waits=waits))

    def _wake(self) -> None:
        if self._wake_fd >= 0:
            os.write(self._wake_fd, b"x")


def _where(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost function outside torch that ``frame`` is in, and whether it is inside a collective."""
    place, waits = "", False
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        waits = waits or module.startswith("torch.distributed")
        if not place and not module.startswith("torch"):
            code = frame.f_code
            place = f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
        frame = frame.f_back
    return place or "no Python function", waits
