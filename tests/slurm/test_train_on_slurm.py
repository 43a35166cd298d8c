from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster, wait_until

from dist_llm.cluster.exit_file import read_exit
from dist_llm.utils.errors import ExitCode

REPO = Path(__file__).parents[2]
STEPS = 200
# The second start imports, meets and trains on two cores that the whole test suite shares.
TIMEOUT_S = 240.0


def dist_llm(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dist_llm", *words],
        cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for path in sorted((REPO / "dist_llm" / "cluster").glob("*.py")) + sorted((REPO / "docs").glob("*.md")):
        (source / f"{path.name}.txt").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    dist_llm("data", "prepare", "--source", str(source), "--out", str(tmp_path / "corpus"), "--vocab-size", "400")
    return tmp_path / "corpus"


def metrics(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    # The last line may be half written while the run goes on.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def test_a_run_on_two_nodes_is_stopped_requeued_and_finished(slurm: SlurmCluster, corpus: Path, tmp_path: Path) -> None:
    # The program is dist-llm; before it starts, each rank says on which of the virtual nodes it is.
    program = tmp_path / "dist-llm"
    program.write_text(
        '#!/bin/sh\n[ "$1" = train ] && echo "rank $SLURM_PROCID is on node $SLURMD_NODENAME" >&2\n'
        f'exec {shlex.quote(sys.executable)} -m dist_llm "$@"\n'
    )
    program.chmod(0o755)
    run_dir = tmp_path / "run of two nodes"
    job = slurm.submit(
        "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/slurm-%j.log",
        "slurm/train.sbatch", "configs/tiny/llama.yaml",
        f"run_dir={run_dir}", f"data.path={corpus}", f"train.steps={STEPS}", "log.every=50",
        # The virtual nodes' names resolve nowhere; on a cluster the first node's name is the meeting point.
        env={"DIST_LLM": str(program), "MASTER_ADDR": "127.0.0.1"}, cwd=REPO,
    )  # fmt: skip
    log_path = tmp_path / f"slurm-{job}.log"

    def log() -> str:
        return (log_path.read_text(encoding="utf-8") if log_path.exists() else "no log") + slurm.logs()

    def trains_or_is_gone() -> bool:
        return len(metrics(run_dir)) >= 5 or slurm.job(job)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING")

    wait_until(trains_or_is_gone, timeout_s=TIMEOUT_S, what="five steps of the first start", report=log)
    assert slurm.job(job)["JobState"] == "RUNNING", log()
    slurm.command("scancel", "--signal=USR1", "--batch", str(job))

    requeued = slurm.wait_for(job, ["PENDING", "FAILED", "COMPLETED"], timeout_s=TIMEOUT_S)
    assert (requeued["JobState"], requeued["Restarts"]) == ("PENDING", "1"), log()
    first = read_exit(run_dir)
    assert first is not None and (first.code, first.attempt) == (ExitCode.REQUEUE, 1), log()
    steps_before = [line["step"] for line in metrics(run_dir)]
    assert steps_before == list(range(1, len(steps_before) + 1))
    assert first.step == len(steps_before) < STEPS, "the signal came too late to interrupt anything"

    slurm.start_now(job)
    done = slurm.wait_for(job, ["COMPLETED", "FAILED"], timeout_s=TIMEOUT_S)
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("COMPLETED", "0:0", "1"), log()
    last = read_exit(run_dir)
    assert last is not None and (last.code, last.attempt, last.step) == (ExitCode.DONE, 2, STEPS)
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, STEPS + 1))

    text = log_path.read_text(encoding="utf-8")
    assert re.findall(r"job \d+, start (\d), 2 ranks on n\[1-2\]", text) == ["1", "2"]
    assert sorted(re.findall(r"rank (\d) is on node (n\d)", text)) == [("0", "n1"), ("0", "n1"), ("1", "n2"), ("1", "n2")]
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(e["event"], e["attempt"]) for e in events if e["event"] in ("start", "resume")] == [("start", 1), ("resume", 2)]
    assert {p.name for p in (run_dir / "logs").glob("*/rank-*.log")} == {"rank-0.log", "rank-1.log"}
