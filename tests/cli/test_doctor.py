"""doctor: what it finds here, and that nothing broken breaks it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_llm.cli import doctor
from dist_llm.cli.doctor import Finding, examine
from dist_llm.cli.main import main
from dist_llm.cluster.inspect import available_memory, slurm
from dist_llm.kernels.table import TABLES


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return examine()


def named(findings: list[Finding], section: str) -> dict[str, Finding]:
    return {f.name: f for f in findings if f.section == section}


def test_json_is_one_object_with_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is (status == 0)
    assert {f["section"] for f in answer["findings"]} == {
        "versions",
        "extension",
        "ops",
        "vendors",
        "devices",
        "launchers",
        "slurm",
        "machine",
    }
    assert {f["mark"] for f in answer["findings"]} <= {"ok", "off", "missing"}
    assert all(f["text"] for f in answer["findings"])


def test_the_table_ends_with_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("\ntraining can run here\n")


def test_every_op_has_one_implementation_that_auto_takes(findings: list[Finding]) -> None:
    taken = [f.name for f in findings if f.section == "ops" and f.text == "taken by auto"]
    on_cpu = [name.removesuffix(" (cpu, bf16)") for name in taken if "(cpu" in name]
    assert len(set(on_cpu)) == len(on_cpu)
    # A line speaks for all functions of an op, or, where they do not run under the same conditions, for one of them.
    assert all(function in on_cpu or table[0].op in on_cpu for function, table in TABLES.items())
    assert set(on_cpu) <= TABLES.keys() | {table[0].op for table in TABLES.values()}


def test_absent_vendor_libraries_are_off_and_not_missing(findings: list[Finding]) -> None:
    vendors = named(findings, "vendors")
    assert set(vendors) == {"flash-attn", "apex"}
    assert all(f.mark == "off" for f in vendors.values())


def test_a_required_package_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", (("no-such-distribution", "1.0", "nothing"), ("numpy", "999.0", "arrays")))
    found = named(list(doctor.versions()), "versions")
    assert found["no-such-distribution"].mark == "missing"
    assert "pip install 'no-such-distribution>=1.0'" in found["no-such-distribution"].text
    assert found["numpy"].mark == "missing"
    assert "999.0 or newer is needed" in found["numpy"].text


def test_a_section_that_breaks_is_reported_and_the_rest_is_examined() -> None:
    def vendors() -> Iterator[Finding]:
        raise OSError("libfoo.so.1: cannot open shared object file")

    def ops() -> Iterator[Finding]:
        raise RuntimeError
        yield

    def last() -> Iterator[Finding]:
        yield Finding("last", "thing", "ok", None, "works")

    broken_vendors, broken_ops, fine = examine((vendors, ops, last))
    assert (broken_vendors.mark, broken_vendors.text) == ("off", "libfoo.so.1: cannot open shared object file")
    assert (broken_ops.mark, broken_ops.value) == ("missing", "RuntimeError")
    assert fine.name == "thing"


def test_instructions_the_processor_lacks_are_reported_with_status_1() -> None:
    environment = {**os.environ, "DIST_LLM_CPU_ISA": "avx1024"}
    command = [sys.executable, "-m", "dist_llm", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    extension = [f for f in json.loads(done.stdout)["findings"] if f["section"] == "extension"]
    if "not built" in extension[0]["text"]:
        pytest.skip(extension[0]["text"])
    assert done.returncode == 1, done.stderr
    assert "DIST_LLM_CPU_ISA=avx1024 cannot run on this processor" in extension[0]["text"]


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, *, scontrol: str) -> None:
    for name, body in (("srun", "echo slurm-wlm 22.05.8"), ("scontrol", scontrol)):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_slurm_that_is_not_installed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    found = slurm()
    assert found.version is None and not found.reachable
    assert "srun and scontrol are not on PATH" in str(found.why_not)


def test_slurm_whose_controller_answers_is_reachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(tmp_path, monkeypatch, scontrol="echo 'Slurmctld(primary) at head is UP'")
    assert slurm() == type(slurm())("slurm-wlm 22.05.8", True, None)


def test_slurm_whose_controller_is_down_is_not_reachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(tmp_path, monkeypatch, scontrol="echo 'Slurmctld(primary) at head is DOWN'; exit 1")
    found = slurm()
    assert found.version == "slurm-wlm 22.05.8"
    assert found.why_not == "the controller is not reachable: Slurmctld(primary) at head is DOWN"


def test_slurm_that_never_answers_is_given_up_after_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(tmp_path, monkeypatch, scontrol="exec sleep 60")
    found = slurm(timeout_s=0.5)
    assert found.why_not == "scontrol ping gave no answer in 0.5 s; is slurmctld running?"


def test_memory_is_the_smaller_of_the_machine_and_its_control_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert available_memory(meminfo, tmp_path) == 4000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert available_memory(meminfo, tmp_path) == 2_000_000
    assert available_memory(tmp_path / "absent", tmp_path / "absent") is None
