"""The build of the extension: every mode of DIST_LLM_BUILD, with and without a compiler, and what is told about it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dist_llm.kernels import extension
from dist_llm.kernels.extension import Extension, open_extension

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


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py with one C++ and one CUDA source to build, and a torch for CUDA 13 whose libraries are empty."""
    spec = importlib.util.spec_from_file_location("setup_of_dist_llm", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, setup)
    spec.loader.exec_module(setup)
    csrc, lib = tmp_path / "csrc", tmp_path / "torch/lib"
    for folder in (csrc, lib, tmp_path / "bin"):
        folder.mkdir(parents=True)
    public = 'extern "C" __attribute__((visibility("default")))'
    (csrc / "small_cpu.cpp").write_text(f"{public} int on_cpu() {{ return 3; }}\n")
    (csrc / "small_cuda.cu").write_text(f"__global__ void empty() {{}}\n{public} void on_cuda() {{ empty<<<1, 1>>>(); }}\n")
    for name in ("torch", "torch_cpu", "torch_cuda"):
        subprocess.run([*setup.find_compiler(), "-shared", "-x", "c++", os.devnull, "-o", str(lib / f"lib{name}.so")], check=True)
    monkeypatch.setattr(setup, "CSRC", csrc)
    monkeypatch.setattr(setup, "find_torch", lambda: setup.Torch("2.11.0+cu130", "13.0", tmp_path, lib))
    return setup


def provide_nvcc(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, release: str = "13.0") -> None:
    """An nvcc that is of CUDA ``release`` and, asked for anything else, does what ``script`` says."""
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.88" && exit\n{script}\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nvcc.parent}:{os.environ['PATH']}")


def symbols(library: Path) -> str:
    return subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout


# Makes an object, and does not find a library.
NO_RUNTIME = """
for word; do case $word in -shared) echo '/usr/bin/ld: cannot find -lcudart' >&2; echo 'collect2: error: ld returned 1' >&2; exit 1;; esac; done
while [ "$1" != -o ]; do shift; done
: > "$2"
"""

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="there is no g++ or no nm")


@needs_gxx
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'small_cuda.cu(1): error: no such instruction' >&2; exit 2", "status 2: small_cuda.cu(1): error: no such instruction"),
        (NO_RUNTIME, "status 1: /usr/bin/ld: cannot find -lcudart"),
    ],
    ids=["compiling", "linking"],
)
def test_cuda_kernels_that_fail_to_build_do_not_take_those_of_the_cpu_with_them(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    provide_nvcc(tmp_path, monkeypatch, script)
    library = tmp_path / "dist_llm/_C.so"
    info = small.build(library, tmp_path / "objects", insists=False)
    assert (info["built"], info["cuda"]) == (True, False)
    assert info["cuda_reason"] == f"building the CUDA kernels failed: nvcc failed with {reason}"
    assert "on_cpu" in symbols(library)
    library.unlink()
    with pytest.raises(small.BuildError, match=re.escape(reason) + "; DIST_LLM_BUILD=auto leaves them out"):
        small.build(library, tmp_path / "objects", insists=True)
    assert not library.exists()


@needs_gxx
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_nvcc_links_both_kinds_of_kernels_with_its_own_runtime(small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = small.nvcc_release()
    monkeypatch.setattr(small, "find_torch", lambda: small.Torch("2.11.0", release, tmp_path, tmp_path / "torch/lib"))
    library = tmp_path / "dist_llm/_C.so"
    info = small.build(library, tmp_path / "objects", insists=True)
    assert (info["cuda"], info["cuda_reason"]) == (True, None)
    assert {"on_cpu", "on_cuda"} <= set(symbols(library).split())
    needed = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True, check=True).stdout
    assert re.search(rf"NEEDED +libcudart\.so\.{release.split('.')[0]}\b", needed)


@needs_gxx
def test_an_nvcc_of_another_major_than_torch_leaves_cuda_out(small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provide_nvcc(tmp_path, monkeypatch, "exit 9", release="12.8")
    assert small.why_no_cuda(small.find_torch()) == (
        "nvcc is of CUDA 12.8 and torch 2.11.0+cu130 of CUDA 13.0; put an nvcc of CUDA 13 first on PATH"
    )
    provide_nvcc(tmp_path, monkeypatch, "exit 9", release="13.2")
    assert small.why_no_cuda(small.find_torch()) is None
    (tmp_path / "bin/nvcc").write_text("#!/bin/sh\nexit 127\n")
    assert small.why_no_cuda(small.find_torch()) == "nvcc --version does not say which release of CUDA it is of"


def test_a_gpu_older_than_the_kernels_is_told_from_one_they_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(extension, "load_extension", lambda: Extension(True, None, "generic", {}))
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert extension.why_no_kernel("gelu", gpu) == "the CUDA kernels need compute capability 8.0, this GPU has 7.5"
    assert extension.why_no_kernel("gelu", torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert extension.why_no_kernel("gelu", gpu) is None


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
