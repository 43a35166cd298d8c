"""Signals end a run in order: saved, said, with the documented exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_llm.checkpoint.load import find_checkpoint
from dist_llm.cluster.exit_file import read_exit
from dist_llm.engine.stop import StopFlag
from dist_llm.utils.errors import ExitCode
from tests.engine.processes import complete, finish, launched, numbers, rank_pids, records, start, train_command, wait_until

LONG = 100_000


def words(corpus: Path, run_dir: Path, *extra: str) -> list[str]:
    return ["configs/tiny/llama.yaml", f"data.path={corpus}", f"run_dir={run_dir}", f"train.steps={LONG}", "log.every=1000", *extra]


def stopped(command: list[str], run_dir: Path, log: Path, act: Callable[[subprocess.Popen[bytes]], None]) -> int:
    process = start(command, log)
    wait_until(lambda: len(records(run_dir)) >= 3, process, log)
    act(process)
    return finish(process, log)


def saved_step(run_dir: Path) -> int:
    found, problems = find_checkpoint(run_dir / "checkpoints")
    assert found is not None and not problems
    return found.manifest.step


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_it_came_in_and_exits_with_its_code(tmp_path: Path, corpus: Path, number: int, code: int) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert stopped(train_command(*words(corpus, run_dir)), run_dir, log, lambda p: os.kill(p.pid, number)) == code, log.read_text()
    assert saved_step(run_dir) == numbers(run_dir)[-1][0]
    record = read_exit(run_dir)
    assert record is not None and (record.code, record.step) == (code, saved_step(run_dir))


def test_ctrl_c_on_the_deepspeed_launcher_saves_on_both_ranks_and_exits_130(tmp_path: Path, corpus: Path) -> None:
    # A terminal sends SIGINT to the launcher and to both ranks; the launcher follows with SIGTERM to the ranks.
    run_dir, log = tmp_path / "run", tmp_path / "log"
    stopped(launched(*words(corpus, run_dir)), run_dir, log, lambda p: os.killpg(p.pid, signal.SIGINT))
    record = read_exit(run_dir)
    assert record is not None and record.code == 130, log.read_text()[-3000:]
    assert saved_step(run_dir) == numbers(run_dir)[-1][0] == record.step


def test_ctrl_c_under_torchrun_which_forwards_it_a_second_time_still_saves(tmp_path: Path, corpus: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    stopped(launched(*words(corpus, run_dir), launcher="torchrun"), run_dir, log, lambda p: os.killpg(p.pid, signal.SIGINT))
    record = read_exit(run_dir)
    assert record is not None and record.code == 130, log.read_text()[-3000:]
    assert saved_step(run_dir) == numbers(run_dir)[-1][0]


def test_one_rank_that_is_told_to_stop_stops_both_together(tmp_path: Path, corpus: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"

    def usr1_to_rank_1(process: subprocess.Popen[bytes]) -> None:
        os.kill(rank_pids(run_dir)[1], signal.SIGUSR1)

    stopped(launched(*words(corpus, run_dir)), run_dir, log, usr1_to_rank_1)
    record = read_exit(run_dir)
    assert record is not None and record.code == 75, log.read_text()[-3000:]
    assert saved_step(run_dir) == numbers(run_dir)[-1][0]


def test_a_second_ctrl_c_stops_at_once_even_in_a_step_that_never_ends(tmp_path: Path, corpus: Path) -> None:
    # One step here takes many seconds: 4,000 rows, read in a fraction of one.
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(train_command(*words(corpus, run_dir, "train.batch_size=4000", "train.micro_batch_size=20")), log)
    wait_until(lambda: "engine plain" in log.read_text(), process, log)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.3)  # longer than what counts as one press
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(5) == 130
    record = read_exit(run_dir)
    assert record is not None and record.code == 130 and "without saving" in record.reason


def test_a_signal_during_the_imports_is_not_lost(tmp_path: Path, corpus: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(train_command(*words(corpus, run_dir)), log)
    caught = Path(f"/proc/{process.pid}/status")
    mask = 1 << (signal.SIGUSR1 - 1)

    def catches_usr1() -> bool:
        return any(line.startswith("SigCgt:") and int(line.split()[1], 16) & mask for line in caught.read_text().splitlines())

    wait_until(catches_usr1, process, log)
    os.kill(process.pid, signal.SIGUSR1)
    assert finish(process, log) == 75, log.read_text()
    assert records(run_dir) == [] and saved_step(run_dir) == 0
    assert complete(train_command(*words(corpus, run_dir, "train.resume=must", "--dry-run")), log) == 0


def test_the_launchers_own_sigterm_after_ctrl_c_changes_nothing() -> None:
    flag = StopFlag()
    flag.received(signal.SIGINT, 10.0)
    flag.received(signal.SIGTERM, 10.1)
    flag.received(signal.SIGINT, 10.5)  # torchrun's copy of the same press
    assert flag.code == ExitCode.INTERRUPTED


def test_sigterm_asks_for_a_requeue_until_somebody_presses_ctrl_c() -> None:
    flag = StopFlag()
    assert flag.code == 0
    flag.received(signal.SIGTERM, 1.0)
    flag.received(signal.SIGUSR1, 2.0)
    assert flag.code == ExitCode.REQUEUE
    flag.received(signal.SIGINT, 3.0)
    assert flag.code == ExitCode.INTERRUPTED


def test_old_handlers_are_back_after_the_loop() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with StopFlag() as flag:
        os.kill(os.getpid(), signal.SIGUSR1)
        stop = time.monotonic() + 5
        while flag.code == 0 and time.monotonic() < stop:
            time.sleep(0.01)
        assert flag.code == ExitCode.REQUEUE
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
