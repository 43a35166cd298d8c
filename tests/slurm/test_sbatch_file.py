from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster, wait_until

REPO = Path(__file__).parents[2]
SBATCH_FILE = REPO / "slurm" / "train.sbatch"


@dataclass
class Job:
    """One submission of slurm/train.sbatch that runs the stand-in."""

    slurm: SlurmCluster
    number: int
    log_path: Path
    run_dir: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8") if self.log_path.exists() else ""

    def ranks(self) -> list[dict[str, Any]]:
        return [json.loads(line.partition(" ")[2]) for line in self.log.splitlines() if line.startswith("up ")]

    def wait_for_ranks(self, count: int) -> None:
        wait_until(lambda: len(self.ranks()) == count, timeout_s=30, what=f"{count} ranks", report=lambda: self.log + self.slurm.logs())

    def exit_code(self) -> int:
        state = self.slurm.wait_for(self.number, ["COMPLETED", "FAILED"])
        print(f"{state}\n{self.log}\n{self.slurm.logs()}")  # pytest shows it when the test fails
        return int(state["ExitCode"].partition(":")[0])


@pytest.fixture
def work(tmp_path: Path) -> Path:
    path = tmp_path / "a folder with spaces"
    path.mkdir()
    program = path / "stand in"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).with_name("stand_in.py")))} "$@"\n')
    program.chmod(0o755)
    return path


def submit(slurm: SlurmCluster, work: Path, *overrides: str, options: tuple[str, ...] = ()) -> Job:
    run_dir = work / "my run"
    run_dir.mkdir(exist_ok=True)
    number = slurm.submit(
        "--nodes=2", "--ntasks-per-node=1", *options, str(SBATCH_FILE), "my config.yaml", f"run_dir={run_dir}", *overrides,
        env={"DIST_LLM": str(work / "stand in"), "PYTHONPATH": str(REPO)}, cwd=work,
    )  # fmt: skip
    return Job(slurm, number, work / f"slurm-{number}.log", run_dir)


def test_arguments_threads_and_paths_with_spaces_reach_every_rank(slurm: SlurmCluster, work: Path) -> None:
    job = submit(slurm, work, "note=a  b", options=("--cpus-per-task=3",))
    assert job.exit_code() == 0, job.log
    ranks = sorted(job.ranks(), key=lambda rank: rank["rank"])
    assert [(r["rank"], r["of"], r["node"], r["threads"]) for r in ranks] == [(0, 2, "n1", "3"), (1, 2, "n2", "3")]
    assert all(r["argv"] == ["my config.yaml", f"run_dir={job.run_dir}", "note=a  b"] for r in ranks)


@pytest.mark.parametrize("code", [2, 76])
def test_an_exit_code_passes_through_and_the_job_is_not_started_again(slurm: SlurmCluster, work: Path, code: int) -> None:
    job = submit(slurm, work, f"exit={code}")
    assert job.exit_code() == code, job.log
    assert slurm.job(job.number)["Restarts"] == "0"


def test_exit_json_says_what_srun_loses(slurm: SlurmCluster, work: Path) -> None:
    # srun answers 75, the highest; the run failed with 1 and must not be requeued for ever.
    job = submit(slurm, work, "exit=1", "rank1_exit=75", "first_cause=1")
    assert job.exit_code() == 1, job.log
    assert "says 1" in job.log


def test_an_exit_json_of_an_earlier_job_is_not_believed(slurm: SlurmCluster, work: Path) -> None:
    (work / "my run").mkdir()
    (work / "my run" / "exit.json").write_text('{\n  "code": 75\n}\n')
    assert submit(slurm, work, "exit=71").exit_code() == 71


def test_a_signal_is_forwarded_to_all_ranks_and_exit_75_requeues(slurm: SlurmCluster, work: Path) -> None:
    job = submit(slurm, work, "wait=1", "slow_s=1")
    job.wait_for_ranks(2)
    slurm.command("scancel", "--signal=USR1", "--batch", str(job.number))
    pending = slurm.wait_for(job.number, ["PENDING"])
    assert pending["Restarts"] == "1"
    assert sorted(re.findall(r"rank (\d) got \['SIGUSR1'\]", job.log)) == ["0", "1"], job.log
    slurm.start_now(job.number)
    assert job.exit_code() == 0
    # Both starts stand in the one log, the second below the first.
    assert [(r["start"]) for r in job.ranks()] == [1, 1, 2, 2]


@pytest.mark.slow  # Slurm looks at time limits every half minute
def test_the_time_limit_sends_the_signal_by_itself(slurm: SlurmCluster, work: Path) -> None:
    job = submit(slurm, work, "wait=1", options=("--time=1", "--signal=B:USR1@59"))
    slurm.wait_for(job.number, ["RUNNING"])
    pending = slurm.wait_for(job.number, ["PENDING", "TIMEOUT", "FAILED", "COMPLETED"], timeout_s=75)
    assert (pending["JobState"], pending["Restarts"]) == ("PENDING", "1"), job.log
    assert sorted(re.findall(r"rank (\d) got \['SIGUSR1'\]", job.log)) == ["0", "1"], job.log
    slurm.command("scancel", str(job.number))


def test_a_job_that_a_user_cancels_saves_and_stays_cancelled(slurm: SlurmCluster, work: Path) -> None:
    job = submit(slurm, work, "wait=1", "slow_s=1")
    job.wait_for_ranks(2)
    slurm.command("scancel", str(job.number))
    # COMPLETING as long as the ranks save, then the state it keeps.
    wait_until(lambda: "leaving it at that" in job.log, timeout_s=30, what="the shell to end", report=lambda: job.log)
    state = slurm.wait_for(job.number, ["CANCELLED"])
    assert state["Restarts"] == "0"
    assert sorted(re.findall(r"rank (\d) got \['SIGTERM'\]", job.log)) == ["0", "1"], job.log


def test_a_missing_config_or_program_ends_the_job_with_the_way_out(slurm: SlurmCluster, work: Path) -> None:
    empty = slurm.submit("--nodes=2", "--ntasks-per-node=1", str(SBATCH_FILE), cwd=work)
    lost = slurm.submit("--nodes=2", "--ntasks-per-node=1", str(SBATCH_FILE), "c.yaml", env={"DIST_LLM": "no/such/program"}, cwd=work)
    for number, words in ((empty, "no config given"), (lost, "no program 'no/such/program'")):
        assert slurm.wait_for(number, ["FAILED"])["ExitCode"] == "2:0"
        assert words in (work / f"slurm-{number}.log").read_text()


def test_the_documented_request_for_gpus_is_one_slurm_accepts(slurm: SlurmCluster, work: Path) -> None:
    request = ("--test-only", "--partition=gpu", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8")
    assert "to start at" in slurm.command("sbatch", *request, str(SBATCH_FILE), "configs/tiny/llama.yaml", cwd=work)
