"""Bad input to `train`: one clear message, the documented exit code, nothing half-written."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.engine.processes import finish, records, start, train_command, wait_until

LLAMA = "configs/tiny/llama.yaml"


def refused(dist_llm: Run, code: int, *words: object) -> str:
    """Run `train`, check the code, and that there is one message and no traceback."""
    done = dist_llm("train", *words)
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("dist-llm train: ")
    return done.stderr


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "copy"))


def test_a_config_typo_names_file_line_and_the_nearest_key(dist_llm: Run, tmp_path: Path) -> None:
    config = tmp_path / "typo.yaml"
    config.write_text(f"extends: {Path(LLAMA).resolve()}\noptim:\n  learning_rte: 1e-3\n")
    said = refused(dist_llm, 2, config)
    assert f"{config}:3" in said and "optim.learning_rte" in said and "optim.lr" in said


def test_a_value_out_of_range_names_the_value_and_the_rule(dist_llm: Run, tmp_path: Path) -> None:
    said = refused(dist_llm, 2, LLAMA, "optim.lr=-1", f"run_dir={tmp_path / 'run'}")
    assert "optim.lr" in said and "-1" in said and "greater than 0" in said
    assert not (tmp_path / "run").exists()


def test_no_corpus_and_a_missing_corpus_are_told_apart(dist_llm: Run, tmp_path: Path) -> None:
    assert "data prepare" in refused(dist_llm, 2, LLAMA, f"run_dir={tmp_path / 'run'}")
    missing = tmp_path / "nowhere"
    assert str(missing) in refused(dist_llm, 65, LLAMA, f"data.path={missing}", f"run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped"])
def test_a_bad_shard_is_named_before_a_step_is_taken(dist_llm: Run, copied: Path, tmp_path: Path, kind: str) -> None:
    shard = copied / "train-000000.tar"
    if kind == "missing":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 16
        shard.write_bytes(data[:-1024] if kind == "truncated" else data)
    said = refused(dist_llm, 65, LLAMA, f"data.path={copied}", f"run_dir={tmp_path / 'run'}")
    assert "train-000000.tar" in said and "data check" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tokenizer_that_is_not_the_shards_own_is_refused(dist_llm: Run, copied: Path, tmp_path: Path) -> None:
    model = copied / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b"\n")
    assert "tokenizer" in refused(dist_llm, 65, LLAMA, f"data.path={copied}", f"run_dir={tmp_path / 'run'}")


def test_a_vocabulary_larger_than_the_models_names_both_sizes(dist_llm: Run, corpus: Path, tmp_path: Path) -> None:
    said = refused(dist_llm, 2, LLAMA, f"data.path={corpus}", "model.vocab_size=400", f"run_dir={tmp_path / 'run'}")
    assert "400" in said and "512" in said and "model.vocab_size=512" in said
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_ranks_cannot_share_is_refused(dist_llm: Run, corpus: Path, tmp_path: Path) -> None:
    words = (LLAMA, f"data.path={corpus}", f"run_dir={tmp_path / 'run'}")
    said = refused(dist_llm, 2, *words, "--dry-run", "--ranks", 3)
    assert "batch_size" in said and "3" in said
    assert "parallel.dp" in refused(dist_llm, 2, *words, "parallel.dp=2")


def test_a_run_directory_in_use_names_its_owner(dist_llm: Run, corpus: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    words = [LLAMA, f"data.path={corpus}", f"run_dir={run_dir}", "train.steps=100000", "log.every=1000"]
    first = start(train_command(*words), log)
    wait_until(lambda: len(records(run_dir)) >= 1, first, log)
    said = refused(dist_llm, 73, *words)
    assert f"process {first.pid}" in said and str(run_dir) in said
    first.send_signal(signal.SIGTERM)
    assert finish(first, log) == 75
    steps = [r["step"] for r in records(run_dir)]
    assert steps == list(range(1, len(steps) + 1))  # the second one wrote nothing into it


def test_a_corpus_shorter_than_a_row_is_refused_before_the_launch(dist_llm: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a short text\n" * 3)
    (tmp_path / "b.txt").write_text("another short text\n" * 3)
    made = dist_llm("data", "prepare", "--source", tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / "d", "--vocab-size", 400)
    assert made.returncode == 0, made.stderr
    said = refused(dist_llm, 65, LLAMA, f"data.path={tmp_path / 'd'}", f"run_dir={tmp_path / 'run'}")
    assert "seq_len" in said


def test_a_kernel_that_cannot_run_and_fp16_are_refused_with_the_reason(dist_llm: Run, corpus: Path, tmp_path: Path) -> None:
    assert "bf16" in refused(dist_llm, 2, LLAMA, "precision=fp16")
    assert "kernels.attention" in refused(dist_llm, 2, LLAMA, f"data.path={corpus}", "kernels.attention=flash")


def test_a_loss_that_is_not_finite_ends_with_76_and_keeps_the_last_checkpoint(dist_llm: Run, corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = (LLAMA, f"data.path={corpus}", f"run_dir={run_dir}", "optim.lr=1e30", "optim.warmup_steps=0", "checkpoint.every=1")
    said = refused_with_output(dist_llm, 76, *words)
    assert "not finite" in said or "is nan" in said or "is inf" in said
    record = json.loads((run_dir / "exit.json").read_text())
    assert record["code"] == 76 and record["traceback"]


def refused_with_output(dist_llm: Run, code: int, *words: object) -> str:
    done = dist_llm("train", *words)
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr


def test_dry_run_resolves_everything_and_writes_nothing(dist_llm: Run, corpus: Path, tmp_path: Path) -> None:
    done = dist_llm("train", LLAMA, "--dry-run", f"data.path={corpus}", f"run_dir={tmp_path / 'run'}", "--ranks", 2, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    told = {"ranks": 2, "engine": "deepspeed", "dp": 2, "zero": 1, "recompute": "none", "precision": "fp32"}
    assert told.items() <= answer["layout"].items()
    assert answer["parameters"]["total"] == 262_720
    assert answer["first_batch"]["rank_0_rows"][0] == [0, 1]
    assert answer["disk"]["checkpoint"] == 12 * 262_720
    assert list(tmp_path.iterdir()) == []
    text = dist_llm("train", LLAMA, "--dry-run", f"data.path={corpus}")
    assert "262,720" in text.stdout and "nothing was written" in text.stdout
