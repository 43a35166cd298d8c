"""A rank that dies, stops, raises or hangs ends the run within seconds, and the run says which one it was."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_llm.cluster.exit_file import ExitRecord, read_exit
from dist_llm.engine.watch import STOPPED_S
from tests.conftest import BIN
from tests.engine.fault_program import TIMEOUT_S
from tests.engine.processes import finish, free_port, numbers, rank_pids, records, start, wait_until

RANKS = 3
LIMIT_S = 20.0  # from the fault to the end of the launcher
HOST = socket.gethostname()
PROGRAM = Path(__file__).with_name("fault_program.py")
LAUNCHERS = ("deepspeed", "torchrun")
# Lines that the launchers print after a rank has ended.
DEEPSPEED_LINE = re.compile(r"\[[-0-9]+ [:,0-9]+\] \[[A-Z]+\] \[launch\.py")


@dataclass(frozen=True)
class End:
    """How a run with a fault ended."""

    seconds: float  # from the fault until the launcher was gone too
    code: int  # the launcher's
    last_line: str  # the last one that the ranks printed
    record: ExitRecord
    text: str


def command(launcher: str, corpus: Path, run_dir: Path, *fault: object) -> list[str]:
    port = free_port()
    what = ["--module", "dist_llm"] if not fault else [str(PROGRAM), *map(str, fault)]
    if launcher == "deepspeed":
        head = [str(BIN / "deepspeed"), "--num_gpus", str(RANKS), "--master_port", port, *what]
    else:
        head = [str(BIN / "torchrun"), "--nproc-per-node", str(RANKS), "--master-port", port, *(["-m", *what[1:]] if not fault else what)]
    return [*head, "train", "configs/tiny/llama.yaml", f"data.path={corpus}", f"run_dir={run_dir}", "train.steps=100000",
            "train.batch_size=6", "train.micro_batch_size=1", "train.threads=1", "log.every=1000"]  # fmt: skip


def left_over(run_dir: Path) -> list[str]:
    """Command lines of live processes that name the run, the launcher's included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f"run_dir={run_dir}" in line:
                found.append(f"{entry.name} {line}")
    return found


def ended(process: subprocess.Popen[bytes], since: float, run_dir: Path, log: Path, launcher: str) -> End:
    try:
        process.wait(LIMIT_S + since - time.monotonic() + 40)
    except subprocess.TimeoutExpired:
        finish(process, log)
    seconds = time.monotonic() - since
    text = log.read_text(encoding="utf-8")
    orphans = left_over(run_dir)
    for line in orphans:
        os.kill(int(line.split()[0]), signal.SIGKILL)
    assert not orphans, f"{orphans}\n{text[-3000:]}"
    lines = text.splitlines()
    ours = [i for i, line in enumerate(lines) if line.startswith("dist-llm train: ")]
    assert ours, text[-3000:]
    if launcher == "deepspeed":  # torchrun adds a page of its own
        strange = [line for line in lines[ours[-1] + 1 :] if not DEEPSPEED_LINE.match(line)]
        assert not strange, text[-3000:]
    record = read_exit(run_dir)
    assert record is not None, text[-3000:]
    return End(seconds, process.returncode, lines[ours[-1]], record, text)


def trial(fault: str, launcher: str, seed: int, corpus: Path, tmp_path: Path) -> End:
    """One fault in one rank at a moment that ``seed`` decides; what must hold of every one of them is held here."""
    random_of = random.Random(f"{fault} {launcher} {seed}")
    rank = random_of.randrange(RANKS)
    run_dir, log = tmp_path / f"run-{seed}", tmp_path / f"log-{seed}"
    if fault == "raise":
        step = random_of.randint(1, 60)
        process = start(command(launcher, corpus, run_dir, "raise", rank, step), log)
        wait_until(lambda: "KeyError: 'planted'" in log.read_text(encoding="utf-8"), process, log)
        since = time.monotonic()
    else:
        process = start(command(launcher, corpus, run_dir), log)
        wait_until(lambda: len(records(run_dir)) >= 3, process, log)
        time.sleep(random_of.uniform(0, 2))
        pid = rank_pids(run_dir)[rank]
        os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        since = time.monotonic()
    end = ended(process, since, run_dir, log, launcher)
    code = {"kill": 1, "stop": 72, "raise": 1}[fault]
    assert (end.record.code, end.record.rank, end.record.host) == (code, rank, HOST), end.text[-3000:]
    assert f"rank {rank} on {HOST} (pid " in end.last_line and end.last_line.endswith("; all ranks stop"), end.text[-3000:]
    assert f"at step {end.record.step}" in end.last_line
    failure = json.loads((run_dir / "health/attempt-1/failure.json").read_text(encoding="utf-8"))
    assert (failure["rank"], failure["code"], failure["host"]) == (rank, code, HOST)
    if fault == "raise":
        assert end.record.step == step - 1 and "KeyError: 'planted'" in end.last_line
        assert end.record.traceback is not None and "faulty_step" in end.record.traceback
    else:
        assert f"(pid {pid})" in end.last_line
        # A launcher that has collected a dead rank before the others looked leaves them only that it is gone.
        gone = ("was killed by signal 9 (SIGKILL)", "ended without a word (killed or crashed")
        assert any(what in end.last_line for what in (gone if fault == "kill" else ("has been stopped by a signal",))), end.last_line
        # The survivors' step, at most one ahead of what the main rank has written down.
        assert end.record.step is not None and 0 <= end.record.step - (numbers(run_dir)[-1][0] - 1) <= 2
    assert end.text.count("all ranks stop") == 1, end.text[-3000:]
    assert end.seconds < LIMIT_S, end.text[-3000:]
    assert end.code != 0 and (launcher == "torchrun" or end.code in (code, 247)), end.code  # 247: the launcher met the killed one first
    return end


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("fault", ["kill", "stop", "raise"])
def test_a_rank_that_fails_ends_all_within_20_s_and_is_named(fault: str, launcher: str, corpus: Path, tmp_path: Path) -> None:
    trial(fault, launcher, 0, corpus, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "stop", "raise"])
def test_twenty_ranks_that_fail_at_random_moments_end_all_within_20_s_and_are_named(fault: str, corpus: Path, tmp_path: Path) -> None:
    ends = [trial(fault, LAUNCHERS[seed % 2], seed, corpus, tmp_path) for seed in range(1, 21)]
    seconds = sorted(end.seconds for end in ends)
    print(f"{fault}: {len(ends)} of {len(ends)} named, seconds: median {seconds[10]:.1f}, longest {seconds[-1]:.1f}", file=sys.stderr)


def test_ranks_that_were_all_stopped_and_go_on_one_after_the_other_are_not_killed(corpus: Path, tmp_path: Path) -> None:
    # SIGSTOP and not SIGTSTP, which a process group without a terminal ignores.
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(command("deepspeed", corpus, run_dir), log)
    wait_until(lambda: len(records(run_dir)) >= 3, process, log)
    pids = rank_pids(run_dir)
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(1)  # the others have seen it when they are stopped themselves
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(STOPPED_S + 1.5)
    before = len(records(run_dir))
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
        time.sleep(1)
    os.killpg(process.pid, signal.SIGCONT)
    wait_until(lambda: len(records(run_dir)) > before + 50, process, log)
    os.kill(pids[0], signal.SIGTERM)
    finish(process, log)
    record = read_exit(run_dir)
    assert record is not None and record.code == 75, log.read_text(encoding="utf-8")[-3000:]
    assert not (run_dir / "health/attempt-1/failure.json").exists()
    assert not list((run_dir / "health/attempt-1/ranks").iterdir())  # every rank left in order


def test_a_rank_that_hangs_alive_is_named_with_the_place_it_hangs_in_and_exit_72(corpus: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(command("deepspeed", corpus, run_dir, "hang", 1, 5), log)
    wait_until(lambda: len(records(run_dir)) >= 4, process, log)
    since = time.monotonic()
    end = ended(process, since, run_dir, log, "deepspeed")
    assert end.code == 72 and (end.record.code, end.record.rank, end.record.step) == (72, 1, 4), end.text[-3000:]
    assert f"rank 1 on {HOST} (pid {rank_pids(run_dir)[1]}) is not in one but in sleep_for_ever (fault_program.py" in end.last_line
    assert "steps done: 4 by rank 0-2" in end.last_line
    assert end.seconds < TIMEOUT_S + LIMIT_S


def test_an_error_for_a_person_in_one_rank_keeps_its_words_and_exit_code(corpus: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(command("deepspeed", corpus, run_dir, "refuse", 2, 5), log)
    wait_until(lambda: "planted-0007.tar" in log.read_text(encoding="utf-8"), process, log)
    end = ended(process, time.monotonic(), run_dir, log, "deepspeed")
    assert end.code == 65 and (end.record.code, end.record.rank, end.record.step) == (65, 2, 4), end.text[-3000:]
    assert "dist-llm train: shard planted-0007.tar is damaged\n" in end.text and "Traceback" not in end.text, end.text[-3000:]
    assert end.last_line.endswith("failed at step 4: DataError: shard planted-0007.tar is damaged; all ranks stop")
    assert f"rank 2 on {HOST} (pid " in end.last_line and end.seconds < LIMIT_S


def test_a_second_ctrl_c_on_one_rank_only_ends_all_with_130(corpus: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(command("deepspeed", corpus, run_dir), log)
    wait_until(lambda: len(records(run_dir)) >= 3, process, log)
    pids = rank_pids(run_dir)
    os.kill(pids[2], signal.SIGSTOP)  # nobody reaches the next step boundary, so the first press cannot save
    os.kill(pids[1], signal.SIGINT)
    time.sleep(1.3)
    os.kill(pids[1], signal.SIGINT)
    process.wait(LIMIT_S)
    record = read_exit(run_dir)
    text = log.read_text(encoding="utf-8")
    assert record is not None and (record.code, record.rank) == (130, 1), text[-3000:]
    assert not left_over(run_dir)
    assert text.count("stopped at once") == 1 and "Traceback" not in text, text[-3000:]


def test_ranks_on_other_machines_learn_who_failed_from_the_run_directory(corpus: Path, tmp_path: Path) -> None:
    # Ranks 0 and 1 on n1, rank 2 on n2: it does not look at their processes.
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(command("deepspeed", corpus, run_dir, "two-machines", 0, 0), log)
    wait_until(lambda: len(records(run_dir)) >= 3, process, log)
    os.kill(rank_pids(run_dir)[1], signal.SIGKILL)
    end = ended(process, time.monotonic(), run_dir, log, "deepspeed")
    assert (end.record.code, end.record.rank, end.record.host) == (1, 1, "n1"), end.text[-3000:]
    assert end.text.count("rank 1 on n1 (pid ") == end.text.count("all ranks stop") == 2, end.text[-3000:]  # one on each machine
    assert end.seconds < LIMIT_S


def test_a_machine_that_vanishes_with_all_its_ranks_still_ends_the_others(corpus: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(command("deepspeed", corpus, run_dir, "two-machines", 0, 0), log)
    wait_until(lambda: len(records(run_dir)) >= 3, process, log)
    os.kill(rank_pids(run_dir)[2], signal.SIGKILL)
    end = ended(process, time.monotonic(), run_dir, log, "deepspeed")
    assert end.record.code == 1 and end.record.rank in (0, 1), end.text[-3000:]
    assert "lost another rank at step" in end.last_line and "a node or the network between nodes may have failed" in end.last_line
    assert end.seconds < LIMIT_S
