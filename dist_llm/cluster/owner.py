"""One writer per run directory: a lock that names its holder and dies with it.

Two jobs that write the same checkpoints destroy both runs without a word, and a requeued job that starts while its
predecessor still saves is exactly that. ``flock`` settles it where the file system has it: the kernel lets go of the
lock when the process ends, however it ends. Where it does not (some Lustre and NFS mounts), the content of the lock file
decides, and Slurm is asked whether the job it names is still there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from dist_llm.utils.errors import RunOwnedError, StorageError

__all__ = ["OWNER_FILE", "Owner", "RunOwner", "has_ended"]

OWNER_FILE = ".owner"
CLAIM_FILE = ".owner.claim"
CLAIM_WAIT_S = 10.0
SQUEUE_TIMEOUT_S = 30.0

# What flock answers on a file system that cannot lock.
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}

# A job in one of these states has no process left. PENDING is a requeued job that waits for its next start.
ENDED_STATES = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PENDING", "PREEMPTED",
    "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "REVOKED", "SPECIAL_EXIT", "TIMEOUT",
}  # fmt: skip


@dataclass(frozen=True)
class Owner:
    """A process that writes into a run directory."""

    host: str
    pid: int
    job: str | None  # Slurm job id
    restart: int  # how often Slurm had requeued the job
    started: str  # UTC, ISO 8601

    @classmethod
    def of_this_process(cls, env: Mapping[str, str]) -> Owner:
        """This process, with the Slurm job that ``env`` names."""
        restart = env.get("SLURM_RESTART_COUNT", "0")
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            job=env.get("SLURM_JOB_ID") or None,
            restart=int(restart) if restart.isdecimal() else 0,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on host {self.host}{job}, since {self.started}"


class RunOwner:
    """Context manager: this process alone writes into ``run_dir``. Rank 0 enters it, before anything is written.

    Args:
        run_dir: the run directory; made when missing.
        env: where the Slurm job is read from (SLURM_JOB_ID, SLURM_RESTART_COUNT).

    Raises:
        RunOwnedError: (on entry) another process owns the directory.
        StorageError: (on entry) the directory or the lock file cannot be written.
    """

    def __init__(self, run_dir: Path, env: Mapping[str, str] = os.environ) -> None:
        self.path = run_dir / OWNER_FILE
        self.owner = Owner.of_this_process(env)
        self._fd: int | None = None

    def __enter__(self) -> RunOwner:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Close-on-exec is Python's default and matters: a child program that inherited the lock would outlive us with it.
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if self._lock(fd):
                    self._write(fd)
                else:
                    self._claim_by_content(fd)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise StorageError(
                f"cannot take the run directory {self.path.parent}: {error.strerror} ({error.filename or self.path}); "
                "check that it is a directory you may write to and that the disk has space"
            ) from error
        self._fd = fd
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        del kind, value, traceback
        assert self._fd is not None, "left without having been entered"
        # Emptied, not removed: another process may have opened the file already and would then lock a file without a name.
        try:
            os.ftruncate(self._fd, 0)
        finally:
            os.close(self._fd)
            self._fd = None

    def _lock(self, fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(_read_owner(fd)) from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise
        return True

    def _claim_by_content(self, fd: int) -> None:
        # Reading, judging and writing must be one step for processes that start together: a file made with O_EXCL
        # is the one thing every file system makes exclusive.
        claim = self.path.with_name(CLAIM_FILE)
        deadline = time.monotonic() + CLAIM_WAIT_S
        while True:
            try:
                os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                break
            except FileExistsError:
                if time.monotonic() > deadline:
                    raise RunOwnedError(
                        f"another process has been starting in {self.path.parent} for {CLAIM_WAIT_S:.0f} s; "
                        f"if none is, a start was killed at a bad moment: remove {claim}"
                    ) from None
                time.sleep(0.05)
        try:
            other = _read_owner(fd)
            # A content that says nothing readable may belong to a live process: only an empty file is free.
            if os.fstat(fd).st_size > 0 and (other is None or not has_ended(other, self.owner)):
                raise self._refusal(other)
            self._write(fd)
        finally:
            claim.unlink(missing_ok=True)

    def _write(self, fd: int) -> None:
        # In place, because the lock belongs to this file and not to its name.
        content = json.dumps(asdict(self.owner), sort_keys=True).encode() + b"\n"
        os.ftruncate(fd, 0)
        os.pwrite(fd, content, 0)
        os.fsync(fd)

    def _refusal(self, other: Owner | None) -> RunOwnedError:
        if other is None:
            return RunOwnedError(
                f"the run directory {self.path.parent} is owned by a process whose name in {self.path} cannot be read; "
                "wait for it, choose another run_dir, or remove that file if nothing uses the directory"
            )
        way_out = f"wait for it, stop it with `scancel {other.job}`" if other.job else "wait for it, stop it"
        if other.host == self.owner.host and not _is_alive(other.pid):
            # A forked child shares its parent's lock and may survive it.
            way_out = "that process has ended, but one it started still holds the lock: find it with `fuser`, stop it"
        return RunOwnedError(
            f"the run directory {self.path.parent} is owned by {other}; {way_out}, or choose another run_dir ({self.path})"
        )


def has_ended(other: Owner, me: Owner) -> bool:
    """Whether the process ``other`` is certainly gone, as far as ``me`` can know without a lock."""
    if other.host == me.host:
        return other.pid == me.pid or not _is_alive(other.pid)
    if other.job is None:
        return False
    if other.job == me.job:
        # Slurm starts a requeued job only after the previous start has ended.
        return other.restart < me.restart
    return _job_has_ended(other.job)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _job_has_ended(job: str) -> bool:
    squeue = shutil.which("squeue")
    if squeue is None or not re.fullmatch(r"[0-9]+", job):
        return False
    try:
        answer = subprocess.run(
            [squeue, "--noheader", "--states=all", f"--jobs={job}", "--format=%T"],
            capture_output=True,
            text=True,
            timeout=SQUEUE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    if answer.returncode != 0:
        # Slurm forgets a job some minutes after its end. Any other failure (no controller) says nothing about it.
        return "Invalid job id" in answer.stderr
    states = answer.stdout.split()
    return all(state in ENDED_STATES for state in states)


def _read_owner(fd: int) -> Owner | None:
    text = os.pread(fd, 65536, 0)
    # Empty after a clean end, and half-written for a moment at a start.
    with contextlib.suppress(ValueError, TypeError, KeyError):
        value = json.loads(text)
        job = value["job"]
        return Owner(
            host=str(value["host"]),
            pid=int(value["pid"]),
            job=None if job is None else str(job),
            restart=int(value["restart"]),
            started=str(value["started"]),
        )
    return None
