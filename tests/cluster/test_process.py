from __future__ import annotations

import dataclasses
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_llm.cluster.process import Process, Sight, State, describe_status, kill, look_at, open_pidfd, this_process


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def started_at(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def named(pid: int) -> Process:
    return dataclasses.replace(this_process(), pid=pid, started=started_at(pid))


def settles_on(process: Process, state: State) -> Sight:
    stop = time.monotonic() + 5
    while look_at(process).state is not state and time.monotonic() < stop:
        time.sleep(0.005)
    return look_at(process)


def test_a_process_is_seen_running_stopped_running_and_dead_of_its_signal(sleeper: subprocess.Popen[bytes]) -> None:
    process = named(sleeper.pid)
    assert look_at(process) == Sight(State.RUNNING)
    os.kill(sleeper.pid, signal.SIGSTOP)
    assert settles_on(process, State.STOPPED) == Sight(State.STOPPED)
    os.kill(sleeper.pid, signal.SIGCONT)
    assert settles_on(process, State.RUNNING) == Sight(State.RUNNING)
    os.kill(sleeper.pid, signal.SIGKILL)
    assert settles_on(process, State.DEAD) == Sight(State.DEAD, status=signal.SIGKILL)  # a zombie still tells
    sleeper.wait()
    assert look_at(process) == Sight(State.DEAD)


def test_a_stopped_process_is_killed_and_a_dead_one_is_not_there_to_kill(sleeper: subprocess.Popen[bytes]) -> None:
    process = named(sleeper.pid)
    os.kill(sleeper.pid, signal.SIGSTOP)
    assert kill(process)
    assert sleeper.wait(5) == -signal.SIGKILL
    assert not kill(process)


def test_a_process_that_got_the_number_of_a_dead_one_is_not_taken_for_it(sleeper: subprocess.Popen[bytes]) -> None:
    earlier = dataclasses.replace(named(sleeper.pid), started=started_at(sleeper.pid) - 1)
    assert look_at(earlier) == Sight(State.DEAD)
    assert not kill(earlier)
    assert sleeper.poll() is None


def test_a_program_whose_name_looks_like_a_state_does_not_confuse(tmp_path: Path) -> None:
    program = tmp_path / "x) T 1 ("
    program.symlink_to(shutil.which("sleep") or "/bin/sleep")
    child = subprocess.Popen([program, "60"])
    try:
        assert "T 1 (" in Path(f"/proc/{child.pid}/comm").read_text()
        assert look_at(named(child.pid)).state is State.RUNNING
    finally:
        child.kill()
        child.wait()


def test_a_death_is_readable_at_once(sleeper: subprocess.Popen[bytes]) -> None:
    fd = open_pidfd(named(sleeper.pid))
    if fd is None:
        pytest.skip("no pidfds on this kernel")
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(50) == []
    sleeper.kill()
    assert poll.poll(5000)
    os.close(fd)


def test_this_process_runs_under_its_own_name() -> None:
    me = this_process()
    assert me.pid == os.getpid() and look_at(me) == Sight(State.RUNNING)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (9, "was killed by signal 9 (SIGKILL)"),
        (11 | 128, "was killed by signal 11 (SIGSEGV)"),  # with a core dump
        (40, "was killed by signal 40"),
        (74 << 8, "ended with exit code 74 without a word"),
        (None, "ended without a word (killed or crashed; its parent has collected how)"),
    ],
)
def test_the_end_of_a_process_is_said_in_words(status: int | None, words: str) -> None:
    assert describe_status(status) == words
