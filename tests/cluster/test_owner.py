from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dist_llm.cluster.owner import CLAIM_FILE, OWNER_FILE, Owner, RunOwner, has_ended
from dist_llm.utils.errors import ExitCode, RunOwnedError, StorageError

HOLD = """
import sys
from pathlib import Path
from dist_llm.cluster.owner import RunOwner
with RunOwner(Path(sys.argv[1]), {"SLURM_JOB_ID": "4711"}):
    print("owned", flush=True)
    sys.stdin.read()
"""

ME = Owner(host="here", pid=os.getpid(), job="20", restart=1, started="2026-01-01T00:00:00+00:00")


@contextmanager
def held_by_another_process(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        try:
            yield process
        finally:
            process.kill()


def pid_of_an_ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(20)
    return process.pid


def test_a_second_process_is_refused_with_host_pid_job_and_the_way_out(tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"
    with held_by_another_process(run_dir) as holder:
        with pytest.raises(RunOwnedError) as caught, RunOwner(run_dir):
            pass
        message = str(caught.value)
        assert caught.value.exit_code == ExitCode.RUN_OWNED
        for part in (str(run_dir), f"process {holder.pid}", f"host {socket.gethostname()}", "Slurm job 4711", "scancel 4711", "run_dir"):
            assert part in message


def test_a_killed_owner_leaves_the_directory_free(tmp_path: Path) -> None:
    with held_by_another_process(tmp_path) as holder:
        holder.kill()
        holder.wait(20)
        with RunOwner(tmp_path):
            assert json.loads((tmp_path / OWNER_FILE).read_text())["pid"] == os.getpid()


def test_after_a_clean_end_the_next_owner_enters(tmp_path: Path) -> None:
    with RunOwner(tmp_path, {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "2"}):
        content = json.loads((tmp_path / OWNER_FILE).read_text())
        assert (content["host"], content["pid"], content["job"], content["restart"]) == (socket.gethostname(), os.getpid(), "1", 2)
    assert (tmp_path / OWNER_FILE).read_text() == ""
    with RunOwner(tmp_path, {}):
        assert json.loads((tmp_path / OWNER_FILE).read_text())["job"] is None


def test_an_error_inside_releases_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunOwner(tmp_path):
        raise ZeroDivisionError
    with RunOwner(tmp_path):
        pass


def test_a_directory_that_cannot_be_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=re.escape(str(tmp_path / "file"))), RunOwner(tmp_path / "file"):
        pass


def test_programs_started_by_the_owner_do_not_inherit_the_lock(tmp_path: Path) -> None:
    with RunOwner(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with child, RunOwner(tmp_path):
        assert child.poll() is None
        child.kill()


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    # No file system at hand refuses locks, so the call answers as one would.
    def refuse(fd: int, operation: int) -> None:
        del fd, operation
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def record(run_dir: Path, owner: Owner) -> None:
    (run_dir / OWNER_FILE).write_text(json.dumps(asdict(owner)))


@pytest.mark.usefixtures("no_flock")
def test_without_locks_a_living_process_is_respected_and_a_dead_one_replaced(tmp_path: Path) -> None:
    here = replace(ME, host=socket.gethostname())
    record(tmp_path, replace(here, pid=os.getppid()))
    with pytest.raises(RunOwnedError, match=f"process {os.getppid()}"), RunOwner(tmp_path):
        pass
    record(tmp_path, replace(here, pid=pid_of_an_ended_process()))
    with RunOwner(tmp_path):
        assert json.loads((tmp_path / OWNER_FILE).read_text())["pid"] == os.getpid()
    assert (tmp_path / OWNER_FILE).read_text() == ""
    assert not (tmp_path / CLAIM_FILE).exists()


@pytest.mark.usefixtures("no_flock")
def test_without_locks_another_host_is_respected(tmp_path: Path) -> None:
    record(tmp_path, replace(ME, host="elsewhere", job=None))
    with pytest.raises(RunOwnedError, match="host elsewhere"), RunOwner(tmp_path, {}):
        pass


@pytest.mark.usefixtures("no_flock")
def test_without_locks_an_unreadable_owner_is_respected(tmp_path: Path) -> None:
    (tmp_path / OWNER_FILE).write_text('{"host": ')
    with pytest.raises(RunOwnedError, match="cannot be read"), RunOwner(tmp_path, {}):
        pass


@pytest.mark.usefixtures("no_flock")
def test_without_locks_a_start_waits_for_another_start_and_tells_when_that_never_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = tmp_path / CLAIM_FILE
    claim.write_text("")
    timer = threading.Timer(0.3, claim.unlink)
    timer.start()
    with RunOwner(tmp_path, {}):
        assert not timer.is_alive()
    claim.write_text("")
    monkeypatch.setattr("dist_llm.cluster.owner.CLAIM_WAIT_S", 0.1)
    with pytest.raises(RunOwnedError, match=re.escape(f"remove {claim}")), RunOwner(tmp_path, {}):
        pass


@pytest.mark.parametrize(
    ("change", "ended"),
    [
        ({"pid": os.getpid()}, True),  # a container gives each start the same number
        ({"pid": os.getppid()}, False),
        ({"host": "elsewhere", "job": None}, False),
        ({"host": "elsewhere", "restart": 0}, True),  # our own job before it was requeued
        ({"host": "elsewhere", "restart": 1}, False),  # another step of our own job
        ({"host": "elsewhere", "job": "no number"}, False),
    ],
)
def test_only_a_process_known_to_be_gone_has_ended(change: dict[str, object], ended: bool) -> None:
    assert has_ended(replace(ME, **change), ME) is ended
