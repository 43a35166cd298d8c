"""The runner: answers, and what is said and left behind when a rank raises, dies, stops or hangs."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_llm.parallel.ranks import _SERVER, RanksFailed, run_on_ranks
from dist_llm.utils.errors import ExitCode, LaunchError
from tests.conftest import ROOT, clean_environment
from tests.parallel import programs

GONE_WITHIN_S = 20


def pids(directory: Path) -> list[int]:
    """Processes of the ranks (and their workers) that wrote themselves down."""
    return [int(path.read_text()) for path in directory.glob("pid-*") if path.read_text()]


def is_running(pid: int) -> bool:
    """False for a zombie: it has ended, and whoever inherits it will reap it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], limit_s: float = 60) -> bool:
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Where ranks write their process ids; after the test none of them may be alive, whatever happened."""
    yield tmp_path
    left = [pid for pid in pids(tmp_path) if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"processes {left} were left"


def failure(program: Callable[..., Any], **arguments: Any) -> tuple[RanksFailed, float]:
    """The error of a call that must fail, and its seconds."""
    run_on_ranks(programs.speak)  # the server is up: what follows measures the call
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run_on_ranks(program, **arguments)
    assert caught.value.exit_code == ExitCode.CHECK_FAILED
    return caught.value, time.monotonic() - start


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def test_answers_come_in_rank_order_with_arguments_passed() -> None:
    answers = run_on_ranks(programs.rank_and_arguments, tp=3, args=(1, "é"), kwargs={"x": [None, 2.5]})
    assert [a["rank"] for a in answers] == [0, 1, 2]
    assert all(a["size"] == 3 and a["args"] == (1, "é") and a["kwargs"] == {"x": [None, 2.5]} for a in answers)


def test_a_world_of_one_runs_in_another_process() -> None:
    (answer,) = run_on_ranks(programs.surroundings)
    assert answer["pid"] != os.getpid()


def test_collectives_run_over_the_groups_of_the_context() -> None:
    answers = run_on_ranks(programs.sums_over_groups, tp=2, dp=2, pp=2, kv_heads=1)

    def digits(*ranks: int) -> float:
        return math.fsum(10.0**rank for rank in ranks)

    assert all(a["world"] == digits(*range(8)) for a in answers)
    assert answers[5] == {
        "world": digits(*range(8)),
        "tp": digits(4, 5),
        "cp": digits(5),
        "dp": digits(5, 7),
        "pp": digits(1, 5),
        "zero": digits(5, 7),
        "model": digits(0, 1, 4, 5),
        "kv": digits(4, 5),
    }


def test_tensors_travel_by_value_in_arguments_and_answers() -> None:
    import torch

    tensors = [torch.tensor([[1.5, -2.0], [0.25, 3.0]], dtype=torch.bfloat16).T, torch.tensor(7), torch.empty(0, 3)]
    for tensor in tensors:
        for answer in run_on_ranks(programs.double, dp=2, args=({"tensor": tensor, "also": "this"},)):
            assert answer["also"] == "this"
            assert answer["tensor"].dtype == tensor.dtype and torch.equal(answer["tensor"], tensor)
            assert torch.equal(answer["doubled"], tensor * 2)


def test_a_rank_has_the_threads_it_is_given() -> None:
    # gloo has threads of its own: the first count has them already.
    for threads in (1, 2):
        for before, after, said in run_on_ranks(programs.threads_in_use, dp=2, kwargs={}, threads=threads):
            assert said == threads
            assert after - before == threads - 1


def test_ranks_see_the_directory_and_environment_of_the_caller_as_they_are_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_ranks(programs.speak)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIST_LLM_TEST_VARIABLE", "set after the server started")
    (answer,) = run_on_ranks(programs.surroundings)
    assert answer["cwd"] == str(tmp_path)
    assert answer["variable"] == "set after the server started"
    assert answer["cuda"] is False


def test_the_slow_imports_are_paid_by_the_server() -> None:
    (loaded,) = run_on_ranks(programs.loaded_before)
    assert "torch._dynamo" in loaded
    if importlib.util.find_spec("deepspeed") is not None:
        assert "deepspeed" in loaded


def test_output_is_passed_on_with_its_rank_only_when_asked(capfd: pytest.CaptureFixture[str]) -> None:
    run_on_ranks(programs.speak, dp=2)
    assert capfd.readouterr() == ("", "")
    run_on_ranks(programs.speak, dp=2, echo=True)
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["rank 0: and on stderr", "rank 0: hello from 0", "rank 1: and on stderr", "rank 1: hello from 1"]
    assert err == ""


@pytest.mark.parametrize("culprit", [0, 2])
def test_an_exception_is_shown_with_its_traceback_and_output_and_ends_the_others_at_once(directory: Path, culprit: int) -> None:
    error, seconds = failure(programs.one_raises, dp=3, args=(directory, culprit, 0.2))
    assert first_line(error) == f"rank {culprit} of 3 raised KeyError: 'the missing thing', in tests.parallel.programs.one_raises"
    assert error.rank == culprit
    assert 'raise KeyError("the missing thing")' in str(error)
    assert "about to raise" in str(error)
    assert "then:" not in str(error), "no other rank failed"
    assert len(pids(directory)) == 3
    assert seconds < 10


def test_of_several_exceptions_the_first_in_time_is_the_cause() -> None:
    error, _ = failure(programs.all_raise_in_turn, dp=3)
    assert first_line(error).startswith("rank 2 of 3 raised ValueError: from 2")
    assert "rank 1 raised ValueError: from 1" in str(error)


def test_an_answer_that_cannot_travel_is_an_error_of_its_rank() -> None:
    error, _ = failure(programs.lambda_answer)
    assert "rank 0 of 1 raised" in first_line(error) and "lambda" in str(error)


@pytest.mark.parametrize("status", [0, 3])
def test_a_rank_that_exits_is_named_with_its_status(directory: Path, status: int) -> None:
    error, seconds = failure(programs.one_exits, dp=2, args=(directory, 1, status))
    assert f"rank 1 of 2 ended with exit status {status} before it had answered" in first_line(error)
    assert seconds < 10


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_killed_by_a_signal_is_the_cause_and_not_the_collectives_that_broke(directory: Path, signum: signal.Signals) -> None:
    error, seconds = failure(programs.one_signals_itself, dp=3, args=(directory, 1, signum))
    assert f"rank 1 of 3 was killed by {signum.name} before it had answered" in first_line(error)
    if signum == signal.SIGSEGV:
        assert "one_signals_itself" in str(error).split("then:")[0].split("\n", 1)[1], "faulthandler says where it crashed"
    assert seconds < 10


def test_a_hang_ends_at_the_deadline_and_says_what_each_rank_was_doing(directory: Path) -> None:
    error, seconds = failure(programs.one_sleeps, dp=3, args=(directory, 1), deadline_s=3)
    assert 3 <= seconds < 8
    assert "rank 1 of 3 had not answered after 3 s" in first_line(error)
    assert "in one_sleeps" in first_line(error) and "time.sleep(1000)" in first_line(error)
    for rank in (0, 2):
        assert f"rank {rank}: waiting in all_reduce, called by one_sleeps" in str(error)
    assert str(error).count("most recent call first") >= 3


def test_a_rank_that_waits_for_one_that_finished_is_named_with_it(directory: Path) -> None:
    error, _ = failure(programs.one_leaves_a_collective_out, dp=2, args=(directory, 1), deadline_s=2)
    assert "rank 0 of 2 had not answered after 2 s" in first_line(error)
    assert "waiting in all_reduce" in first_line(error) and "while rank 1 had finished" in first_line(error)


def test_a_stopped_rank_is_named_at_the_deadline(directory: Path) -> None:
    error, seconds = failure(programs.one_signals_itself, dp=2, args=(directory, 1, signal.SIGSTOP), deadline_s=3)
    assert 3 <= seconds < 8
    assert "rank 1 of 2 had not answered after 3 s" in first_line(error) and "stopped by a signal (SIGSTOP)" in first_line(error)
    assert "programs.py:" in first_line(error), "and where it was stopped"
    assert "rank 0: waiting in barrier" in str(error)


def test_what_a_rank_forked_is_killed_with_it(directory: Path) -> None:
    failure(programs.with_workers, dp=2, args=(directory,), deadline_s=2)
    assert len(pids(directory)) == 4


def test_a_call_after_a_failure_works_and_uses_the_same_server() -> None:
    failure(programs.all_raise_in_turn, dp=2)
    start = time.monotonic()
    assert [a["rank"] for a in run_on_ranks(programs.rank_and_arguments, dp=2)] == [0, 1]
    assert time.monotonic() - start < 3, "a new server imports torch for longer"


def test_nothing_is_left_in_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_on_ranks(programs.speak, dp=2)
    failure(programs.all_raise_in_turn, dp=2)
    assert list(tmp_path.iterdir()) == []


def test_calls_from_two_threads_take_turns() -> None:
    answers: dict[int, list[Any]] = {}

    def call(size: int) -> None:
        answers[size] = run_on_ranks(programs.sums_over_groups, dp=size)

    callers = [threading.Thread(target=call, args=(size,)) for size in (2, 3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [a["world"] for a in answers[2]] == [11.0] * 2
    assert [a["world"] for a in answers[3]] == [111.0] * 3


def test_a_killed_server_takes_its_ranks_along_and_the_next_call_starts_another(directory: Path) -> None:
    run_on_ranks(programs.speak)
    server = _SERVER.get()._process.pid

    def kill() -> None:
        wait_until(lambda: len(pids(directory)) == 2)
        os.kill(server, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(LaunchError, match=r"died.*was killed by SIGKILL"):
        run_on_ranks(programs.one_sleeps, dp=2, args=(directory, 0))
    killer.join()
    assert wait_until(lambda: not any(map(is_running, pids(directory))), 5)
    assert len(run_on_ranks(programs.rank_and_arguments, dp=2)) == 2


CALLER = """
import os, sys
from pathlib import Path
from dist_llm.parallel.ranks import _SERVER, run_on_ranks
from tests.parallel import programs
directory = Path(sys.argv[1])
server = _SERVER.get()._process.pid
(directory / "pid-server").write_text(str(server))
try:
    run_on_ranks(programs.one_sleeps, dp=2, args=(directory, 0))
except KeyboardInterrupt:
    (directory / "interrupted").touch()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_when_the_caller_is_interrupted_or_killed_ranks_and_server_go(directory: Path, signum: signal.Signals) -> None:
    command = [sys.executable, "-c", CALLER, str(directory)]
    temporary = directory / "tmp"
    temporary.mkdir()
    environment = clean_environment() | {"TMPDIR": str(temporary)}
    caller = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert wait_until(lambda: len(pids(directory)) == 3), "server and two ranks"
        os.killpg(caller.pid, signum)  # what a terminal does
        _, stderr = caller.communicate(timeout=GONE_WITHIN_S)
    finally:
        if caller.poll() is None:
            caller.kill()
    assert wait_until(lambda: not any(map(is_running, pids(directory))), 5)
    assert list(temporary.glob("dist_llm-*")) == []
    assert (directory / "interrupted").exists() == (signum == signal.SIGINT)
    assert stderr == ""


@pytest.mark.parametrize(
    ("program", "arguments", "says"),
    [
        (lambda ctx: ctx, {}, "does not give this function"),
        (programs.NOT_A_FUNCTION_OF_ITS_OWN[0], {}, "does not give this function"),
        (programs.speak, {"tp": 0}, "tp is 0"),
        (programs.speak, {"threads": 0}, "threads is 0"),
        (programs.speak, {"deadline_s": 0}, "deadline_s is 0"),
    ],
)
def test_a_call_that_cannot_work_is_refused_before_any_process_starts(
    program: Callable[..., Any], arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        run_on_ranks(program, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "kill", "stop"])
@pytest.mark.parametrize("trial", range(20))
def test_at_a_random_moment_the_culprit_is_named_and_all_are_gone(directory: Path, how: str, trial: int) -> None:
    chance = random.Random(f"{how} {trial}")
    culprit, after_s = chance.randrange(4), chance.uniform(0, 1)
    error, seconds = failure(programs.at_random_one_fails, tp=2, dp=2, args=(directory, culprit, how, after_s), deadline_s=4)
    assert error.rank == culprit, first_line(error)
    assert not any(map(is_running, pids(directory)))
    assert seconds < GONE_WITHIN_S
