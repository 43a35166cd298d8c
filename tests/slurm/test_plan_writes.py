from __future__ import annotations

import json
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster

from dist_llm.cli.main import main
from dist_llm.config.load import load_config


@pytest.mark.parametrize(("gpus", "nodes"), [("16xH100-80G", 2), ("4xH200", 1)])
def test_slurm_accepts_what_plan_writes(
    slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], gpus: str, nodes: int
) -> None:
    folder = tmp_path / "a plan"  # a path with a space
    assert main(["plan", "--gpus", gpus, "--days", "2", "--job-hours", "36", "--write", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    script = said["written"]["sbatch"]
    request = slurm.command("sbatch", "--test-only", "--partition=gpu", script, cwd=tmp_path)
    assert "to start at" in request
    job = slurm.submit("--hold", "--partition=gpu", script, cwd=tmp_path)
    seen = slurm.job(job)
    slurm.command("scancel", str(job))
    assert seen["JobName"] == "planned" and seen["TimeLimit"] == "1-12:00:00"
    assert seen["NumNodes"].partition("-")[0] == str(nodes)
    assert int(seen["NumTasks"]) == said["gpus"]
    load_config(said["written"]["config"], ranks=said["gpus"])


def test_a_written_script_runs_its_own_config_and_takes_overrides(slurm: SlurmCluster, tmp_path: Path) -> None:
    # The real script up to the point where it asks dist-llm for the config: a program that is not there ends it with 2, a stand-in shows its words.
    folder = tmp_path / "plan"
    assert main(["plan", "--gpus", "2xcpu", "--hours", "1", "--seq-len", "256", "--write", str(folder)]) == 0
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "words: $*" >&2\nexit 9\n')
    program.chmod(0o755)
    job = slurm.submit(str(folder / "train.sbatch"), "note=a b", env={"DIST_LLM": str(program)}, cwd=tmp_path)
    assert slurm.wait_for(job, ["FAILED"])["ExitCode"] == "9:0"
    log = (tmp_path / f"slurm-{job}.log").read_text()
    assert f"words: config show {folder / 'config.yaml'} note=a b" in log
