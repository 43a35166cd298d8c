"""A disk that refuses: the documented exit code on every rank, and what was saved before is still there."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

from dist_llm.checkpoint.load import find_checkpoint
from tests.conftest import ROOT, clean_environment
from tests.engine.processes import launched, train_command

LIMIT = 700_000  # bytes a file may have: enough for logs and metrics, too few for the weights


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


def words(corpus: Path, run_dir: Path, *extra: str) -> list[str]:
    return ["configs/tiny/llama.yaml", f"data.path={corpus}", f"run_dir={run_dir}", "train.steps=6", *extra]


def run(command: list[str], *, limited: bool) -> subprocess.CompletedProcess[str]:
    start = limit_file_size if limited else None
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=clean_environment(), timeout=120, check=False, preexec_fn=start
    )


def test_a_checkpoint_that_does_not_fit_ends_with_74_and_the_earlier_one_is_whole(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    first = run(train_command(*words(corpus, run_dir, "optim.schedule=constant")), limited=False)
    assert first.returncode == 0, first.stderr
    done = run(train_command(*words(corpus, run_dir, "optim.schedule=constant", "train.steps=8")), limited=True)
    assert done.returncode == 74, done.stderr
    assert "cannot save" in done.stderr and "untouched" in done.stderr and "Traceback" not in done.stderr
    found, problems = find_checkpoint(run_dir / "checkpoints")
    assert found is not None and found.manifest.step == 6 and not problems
    again = run(train_command(*words(corpus, run_dir, "optim.schedule=constant", "train.steps=8")), limited=False)
    assert again.returncode == 0, again.stderr


def test_all_ranks_learn_of_a_full_disk_at_once(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    done = run(launched(*words(corpus, run_dir, "optim.schedule=constant"), launcher="deepspeed"), limited=True)
    assert "cannot save" in done.stderr + done.stdout
    assert '"code": 74' in (run_dir / "exit.json").read_text()
    assert "StorageError" in (run_dir / "logs/attempt-1/rank-1.log").read_text()
