from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster

from dist_llm.cluster.owner import Owner, has_ended


def test_an_owner_on_another_node_has_ended_when_its_job_has(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "sleep.sh"
    script.write_text("#!/bin/sh\nsleep 60\n")
    job = slurm.submit("--output=/dev/null", str(script))
    slurm.wait_for(job, ["RUNNING"])
    me = Owner(host="here", pid=1, job=None, restart=0, started="")
    other = replace(me, host="elsewhere", job=str(job))

    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    assert not has_ended(other, me)
    slurm.command("scancel", str(job))
    slurm.wait_for(job, ["CANCELLED"])
    assert has_ended(other, me)
    assert has_ended(replace(other, job="987654"), me), "Slurm has forgotten the job"

    # A controller that does not answer says nothing about a job.
    monkeypatch.setattr("dist_llm.cluster.owner.SQUEUE_TIMEOUT_S", 1.0)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "no.conf"))
    assert not has_ended(other, me)
