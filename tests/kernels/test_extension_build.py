"""The build of the extension: every mode of DIST_LLM_BUILD, with and without a compiler, and what is told about it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_llm.kernels.extension import open_extension

ROOT = Path(__file__).resolve().parents[2]


def build(target: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the real build into ``target``, as an installation of a wheel does."""
    environment = {k: v for k, v in os.environ.items() if k not in ("DIST_LLM_BUILD", "CXX")} | variables
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={target}", f"--build-temp={target / 'objects'}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def build_info(target: Path) -> dict[str, object]:
    return json.loads((target / "dist_llm/_build_info.json").read_text())


def test_build_0_leaves_the_reference_path_and_says_so(tmp_path: Path) -> None:
    done = build(tmp_path, DIST_LLM_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert "the PyTorch reference path is used: DIST_LLM_BUILD=0" in done.stderr
    extension = open_extension(tmp_path / "dist_llm")
    assert not extension.loaded
    assert "DIST_LLM_BUILD=0 when the package was installed" in str(extension.why_not)


def test_auto_without_a_compiler_installs_and_keeps_the_reason(tmp_path: Path) -> None:
    stale = tmp_path / "dist_llm/_C.so"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier build")
    done = build(tmp_path, CXX="/nonexistent/g++")
    assert done.returncode == 0, done.stderr
    assert "CXX=/nonexistent/g++ is not there" in done.stderr
    assert build_info(tmp_path)["built"] is False
    assert not stale.exists()


def test_auto_with_a_compiler_that_fails_installs_and_keeps_the_first_error(tmp_path: Path) -> None:
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'source.cpp:1: error: no such instruction' >&2\nexit 3\n")
    compiler.chmod(0o755)
    done = build(tmp_path, CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    assert str(build_info(tmp_path)["reason"]).endswith("failed with status 3: source.cpp:1: error: no such instruction")


def test_build_1_fails_without_a_compiler(tmp_path: Path) -> None:
    done = build(tmp_path, DIST_LLM_BUILD="1", CXX="/nonexistent/g++")
    assert done.returncode != 0
    assert "DIST_LLM_BUILD=1, but the extension cannot be built: the C++ compiler CXX=/nonexistent/g++ is not there" in done.stderr


def test_an_unknown_build_mode_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path, DIST_LLM_BUILD="yes")
    assert done.returncode != 0
    assert "DIST_LLM_BUILD=yes is not one of auto, 0, 1" in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="there is no C++ compiler")
def test_the_build_makes_a_library_that_loads_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = build(tmp_path, DIST_LLM_BUILD="1")
    assert done.returncode == 0, done.stderr
    assert build_info(tmp_path)["built"] is True
    script = "import sys; from pathlib import Path; from dist_llm.kernels.extension import open_extension; print(open_extension(Path(sys.argv[1])).cpu_isa)"
    loaded = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "dist_llm")], capture_output=True, text=True, timeout=120, check=True
    )
    assert loaded.stdout.strip() in ("avx512", "avx2", "generic")


def test_a_library_that_does_not_load_is_a_reason_and_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"not a library")
    (tmp_path / "_build_info.json").write_text('{"built": true, "torch": "2.11.0"}')
    extension = open_extension(tmp_path)
    assert not extension.loaded
    assert "built with torch 2.11.0, does not load with torch" in str(extension.why_not)


def test_a_package_that_was_never_built_says_so(tmp_path: Path) -> None:
    assert "the package was never built here" in str(open_extension(tmp_path).why_not)


def test_compile_cuda_without_nvcc_says_so_and_passes_unless_required() -> None:
    environment = {**os.environ, "PATH": "/nonexistent"}
    for arguments, status in (([], 0), (["--require"], 1)):
        command = [sys.executable, "tools/compile_cuda.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == status
        assert re.search(r"nvcc is not on PATH: \d+ CUDA source\(s\) NOT compiled", done.stdout)
