"""What tools/compile_cuda.py makes of ptxas's messages; an nvcc that only says what a real one says stands in for it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# As nvcc 13.0 prints it, for a kernel and for one that calls a function that is not inlined.
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4wideIfEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z4wideIfEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used {wide} registers, used 1 barriers, 128 bytes smem, 425 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6narrowv' for 'sm_80'
ptxas info    : Function properties for _Z6narrowv
    8 bytes stack frame, {stores} bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for _Z6callee
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""
PTX = """\
.visible .entry _Z4wideIfEvPT_(
\t.param .u64 .ptr .align 1 _Z4wideIfEvPT__param_0
)
{bounds}{{
\tret;
}}
.visible .entry _Z6narrowv()
{{
\tret;
}}
"""


class Compile:
    """Runs the tool's part for one source, whose kernels are as told."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.capsys = folder, capsys
        spec = importlib.util.spec_from_file_location("compile_cuda", ROOT / "tools/compile_cuda.py")
        assert spec is not None and spec.loader is not None
        self.tool = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, self.tool)
        monkeypatch.setattr(sys, "path", [*sys.path])
        spec.loader.exec_module(self.tool)
        nvcc = folder / "nvcc"
        keep = f'while [ "$1" != --keep-dir ]; do shift; done\ncp {folder}/ptx "$2/kernels.compute_80.ptx"\ncat {folder}/said >&2\n'
        nvcc.write_text(f"#!/bin/sh\n{keep}")
        nvcc.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def __call__(self, *, wide: int = 64, bounds: str = "", stores: int = 0) -> tuple[bool, str, str]:
        """Whether the kernels pass, and what is printed."""
        (self.folder / "said").write_text(PTXAS.format(wide=wide, stores=stores))
        (self.folder / "ptx").write_text(PTX.format(bounds=bounds))
        passes = self.tool.compile_one(self.folder / "kernels.cu", self.folder, self.folder, lists=False)
        said = self.capsys.readouterr()
        return passes, said.out, said.err


@pytest.fixture
def compile_cuda(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Compile:
    return Compile(tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("wide", "bounds", "threads"),
    [
        (64, "", None),
        (65, "", "without __launch_bounds__ a block may have 1024"),
        (65, ".maxntid 1024, 1, 1\n", "its __launch_bounds__ allow 1024"),
        (128, ".maxntid 32, 16, 1\n.minnctapersm 1\n", None),
        (129, ".maxntid 512\n", "its __launch_bounds__ allow 512"),
    ],
)
def test_a_kernel_must_fit_into_the_registers_of_the_largest_block_it_may_have(
    compile_cuda: Compile, wide: int, bounds: str, threads: str | None
) -> None:
    passes, out, err = compile_cuda(wide=wide, bounds=bounds)
    assert passes == (threads is None)
    assert f"2 kernels, at most {wide} registers (" in out
    if threads is not None:
        assert "FAILED in" in out
        assert f" on sm_80 uses {wide} registers and {threads} threads: more than 65536" in err


def test_a_few_spilled_registers_are_shown_and_many_fail(compile_cuda: Compile) -> None:
    passes, out, _ = compile_cuda(stores=8)
    assert passes
    assert "32 registers, any threads, 20 bytes spilled" in out
    passes, _, err = compile_cuda(stores=1000)
    assert not passes
    assert "spills: 1012 bytes of stores and loads" in err
