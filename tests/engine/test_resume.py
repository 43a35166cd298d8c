"""A run that was killed and started again is the run that was never killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from dist_llm.cluster.exit_file import read_exit
from tests.engine.processes import complete, finish, launched, numbers, rank_pids, records, start, train_command, wait_until

STEPS = 60


def words(corpus: Path, run_dir: Path, *extra: str) -> list[str]:
    return [
        "configs/tiny/llama.yaml", f"data.path={corpus}", f"run_dir={run_dir}", f"train.steps={STEPS}", "checkpoint.every=5",
        "train.threads=1", "log.every=1000", *extra,
    ]  # fmt: skip


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def kill_after(step: int, command: list[str], run_dir: Path, log: Path) -> None:
    process = start(command, log)
    wait_until(lambda: len(records(run_dir)) >= step, process, log)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in rank_pids(run_dir):  # torchrun gives its ranks sessions of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    finish(process, log)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_killed_twice_ends_with_the_same_digits_as_one_never_killed(tmp_path: Path, corpus: Path, precision: str) -> None:
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    assert complete(train_command(*words(corpus, whole, f"precision={precision}")), log) == 0
    command = train_command(*words(corpus, killed, f"precision={precision}"))
    kill_after(13, command, killed, log)  # past two checkpoints, between them and the next
    taken = len(records(killed))
    kill_after(taken + 9, command, killed, log)
    assert len(records(killed)) < STEPS
    assert complete(command, log) == 0, log.read_text()
    assert numbers(killed) == numbers(whole)
    assert [r["step"] for r in records(killed)] == list(range(1, STEPS + 1))
    last = [records(d, "eval")[-1]["bits_per_byte"] for d in (whole, killed)]
    assert last[0] == last[1]
    resumes = [e for e in map(json.loads, (killed / "events.jsonl").read_text().splitlines()) if e["event"] == "resume"]
    # The first kill came after a save, the second may have come before the next one: each resume starts at a multiple of 5.
    assert len(resumes) == 2 and all(e["step"] % 5 == 0 and e["step"] >= 10 for e in resumes)


def test_two_ranks_with_zero1_in_bf16_killed_under_the_launcher_end_with_the_same_digits(tmp_path: Path, corpus: Path) -> None:
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    extra = ("precision=bf16", "parallel.zero=1")
    assert complete(launched(*words(corpus, whole, *extra)), log) == 0, log.read_text()[-3000:]
    kill_after(17, launched(*words(corpus, killed, *extra)), killed, log)
    assert complete(launched(*words(corpus, killed, *extra)), log) == 0, log.read_text()[-3000:]
    assert numbers(killed) == numbers(whole)


def test_a_finished_run_started_again_changes_nothing_and_says_so(tmp_path: Path, corpus: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = train_command(*words(corpus, run_dir, "train.steps=3"))
    assert complete(command, log) == 0
    before = contents(run_dir)
    assert complete(command, log) == 0
    assert contents(run_dir) == before
    assert "is finished" in log.read_text()


def test_a_checkpoint_of_another_run_is_refused_with_the_differences(tmp_path: Path, corpus: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert complete(train_command(*words(corpus, run_dir, "train.steps=3")), log) == 0
    assert complete(train_command(*words(corpus, run_dir, "train.steps=3", "optim.lr=0.1", "model.ffn_dim=64")), log) == 2
    said = log.read_text()
    assert "optim.lr: 0.001 in the checkpoint, 0.1 now" in said and "model.ffn_dim" in said and "another name" in said


def test_a_run_saved_on_two_ranks_goes_on_on_one(tmp_path: Path, corpus: Path) -> None:
    run_dir, whole, log = tmp_path / "run", tmp_path / "whole", tmp_path / "log"
    kill_after(12, launched(*words(corpus, run_dir, "parallel.zero=2"), launcher="torchrun"), run_dir, log)
    assert complete(train_command(*words(corpus, run_dir)), log) == 0, log.read_text()[-3000:]
    assert complete(train_command(*words(corpus, whole)), log) == 0
    for (step, loss, _), (_, expected, _) in zip(numbers(run_dir), numbers(whole), strict=True):
        assert abs(loss - expected) < 1e-5 * expected, step  # another order of sums: fp32 rounding, grown over 60 steps


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_still_ends_the_same(tmp_path: Path, corpus: Path) -> None:
    whole, run_dir, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert complete(train_command(*words(corpus, whole, "train.steps=20")), log) == 0
    command = train_command(*words(corpus, run_dir, "train.steps=20"))
    assert complete(command, log) == 0
    newest = run_dir / "checkpoints" / "step-00000020"
    file = next(newest.glob("weights-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert complete(command, log) == 0, log.read_text()[-3000:]
    assert "passing over a checkpoint" in log.read_text() and file.name in log.read_text()
    assert numbers(run_dir) == numbers(whole)


def test_only_damaged_checkpoints_are_refused_and_must_needs_one(tmp_path: Path, corpus: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert complete(train_command(*words(corpus, run_dir, "train.resume=must")), log) == 66
    assert complete(train_command(*words(corpus, run_dir, "train.steps=2")), log) == 0
    for manifest in run_dir.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    assert complete(train_command(*words(corpus, run_dir, "train.steps=2")), log) == 66
    assert "never finished" in log.read_text()
    record = read_exit(run_dir)
    assert record is not None and record.code == 0  # of the attempt that ran; the refused one touched nothing
