"""The main job, small: every step of `make quickstart` on a few files of the library."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import yaml

from tests.conftest import ROOT, clean_environment
from tests.engine.processes import records


def quickstart(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    library = Path(sysconfig.get_path("stdlib"))
    sources = [str(library / name) for name in ("argparse.py", "ast.py", "json", "email", "asyncio", "http", "unittest")]
    command = [sys.executable, ROOT / "tools/quickstart.py", "--minutes", "0.5", "--vocab-size", "512", "--work", tmp_path / "work",
               "--run-dir", tmp_path / "run", "--source", *sources, *words]  # fmt: skip
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=clean_environment(), timeout=300, check=False)


def test_the_quickstart_trains_evaluates_samples_and_reports_and_a_second_run_reuses_it(tmp_path: Path) -> None:
    first = quickstart(tmp_path)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    run_dir = tmp_path / "run"
    results = json.loads((run_dir / "results.json").read_text())
    assert 18 <= results["plan"]["tokens_per_param"] <= 22
    assert "extrapolation" in results["plan"]["reason"] and "passes over it" in results["plan"]["reason"]
    assert 0 < results["eval"]["bits_per_byte"] < 8 and results["baselines"]["lzma_bits_per_byte"] > 0
    assert results["eval"]["bits_per_byte"] == records(run_dir, "eval")[-1]["bits_per_byte"]
    assert results["sample"]["continuation"]
    environment = json.loads((run_dir / "env.json").read_text())
    assert (environment["launcher"], environment["ranks"]) == ("deepspeed", 2)
    config = yaml.safe_load((run_dir / "config.resolved.yaml").read_text())
    assert (config["precision"], config["parallel"]["zero"]) == ("bf16", 1)
    assert "deepspeed --num_gpus 2" in first.stdout and "byte-unigram" in first.stdout
    html = (run_dir / "report.html").read_text()
    assert "<svg" in html or "data:image/png" in html
    metrics = (run_dir / "metrics.jsonl").read_bytes()

    second = quickstart(tmp_path)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    assert "reusing" in second.stdout and "is finished" in second.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics

    missing = quickstart(tmp_path, "--source", str(tmp_path / "nowhere"))
    assert missing.returncode == 65 and "nowhere" in missing.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics
