"""A run that does not fit says so, with the keys that would help, and exits with 71."""

from __future__ import annotations

import json
import resource
import subprocess
from pathlib import Path

from tests.conftest import ROOT, clean_environment
from tests.engine.processes import train_command


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


def test_a_batch_that_does_not_fit_ends_with_71_and_names_the_keys(tmp_path: Path, corpus: Path) -> None:
    words = ["configs/tiny/llama.yaml", f"data.path={corpus}", f"run_dir={tmp_path / 'run'}", "train.batch_size=40000",
             "train.micro_batch_size=40000", "kernels.attention=reference"]  # fmt: skip
    done = subprocess.run(
        train_command(*words), capture_output=True, text=True, cwd=ROOT, env=clean_environment(), timeout=120, check=False,
        preexec_fn=limit_memory,
    )  # fmt: skip
    assert done.returncode == 71, done.stderr[-2000:]
    assert "train.micro_batch_size (40000)" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 71
