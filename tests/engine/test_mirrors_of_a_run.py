"""What the mirrors hold after a real run that was stopped and went on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.engine.processes import complete, finish, records, start, train_command, wait_until
from tests.report.wandb_offline import read_wandb_offline

STEPS = 40


def test_wandb_offline_and_tensorboard_hold_every_step_of_a_run_that_was_stopped_and_went_on(tmp_path: Path, corpus: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    words = ["configs/tiny/gpt2.yaml", f"data.path={corpus}", f"run_dir={run_dir}", f"train.steps={STEPS}", "log.wandb=offline",
             "log.tensorboard=true", "eval.every=10", "eval.rows=8"]  # fmt: skip
    process = start(train_command(*words), log)
    wait_until(lambda: len(records(run_dir)) >= 5, process, log)
    process.send_signal(signal.SIGTERM)
    assert finish(process, log) == 75, log.read_text()
    assert complete(train_command(*words), log) == 0, log.read_text()[-3000:]

    truth = {r["step"]: r for r in records(run_dir)}
    assert sorted(truth) == list(range(1, STEPS + 1))
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    rows = [row for file in files for row in read_wandb_offline(file)]
    logged = {int(row["train/step"]): row for row in rows if "train/loss" in row}
    assert sorted(logged) == sorted(truth)
    assert all(logged[step]["train/loss"] == truth[step]["loss"] for step in truth)
    assert all(logged[step]["perf/tokens_per_s"] == truth[step]["tokens_per_s"] for step in truth)
    assert {row["run/attempt"] for row in rows} == {1, 2}
    evaluated = [row["train/step"] for row in rows if "eval/bits_per_byte" in row]
    assert evaluated == [r["step"] for r in records(run_dir, "eval")]
    assert len({file.name.split("run-")[1] for file in files}) == 1  # one run id over both attempts

    board = EventAccumulator(str(run_dir / "tb"))
    board.Reload()
    assert [e.step for e in board.Scalars("train/loss")] == list(range(1, STEPS + 1))

    needed = {"loss", "bits_per_byte", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu", "step_s", "data_s", "comm_s", "memory_bytes"}
    assert all(needed <= r.keys() for r in truth.values())
    events = [json.loads(line)["event"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert events == ["start", "checkpoint", "stop", "resume", "checkpoint", "finish"]
