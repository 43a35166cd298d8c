"""CUDA kernels without a GPU, compiled as C++ by tests/cuda_emulator; and the emulator itself, by faults that it must find."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import clean_environment
from tests.cuda_emulator import build as emulator
from tests.cuda_emulator.__main__ import NOTHING_RAN
from tests.kernels import cases

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests/cuda_emulator"
MODULES = sorted(module.name for module in pkgutil.iter_modules(cases.__path__))
# Ops with nothing of ours to run on a GPU.
CPU_ONLY = {"linear"}

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """This Python in a process of its own: a library can be taken for the extension only before another one is."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def all_kernels() -> Path:
    """Every .cu file of csrc/."""
    return emulator.build()


@pytest.mark.parametrize("module", MODULES)
def test_cuda_kernels_are_as_exact_as_their_references(all_kernels: Path, module: str) -> None:
    done = run("-m", "tests.cuda_emulator", "--library", all_kernels, "--module", module, "--quick")
    if module in CPU_ONLY:
        assert not list(emulator.CSRC.glob(f"{module}/*.cu"))
        assert done.returncode == NOTHING_RAN, done.stdout[-3000:] + done.stderr[-3000:]
        return
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ran = set(re.findall(r"^ok (\w+): [1-9]", done.stdout, re.MULTILINE))
    assert ran == {case.name for case in importlib.import_module(f"{cases.__name__}.{module}").CASES}, done.stdout


def test_sizes_that_are_left_out_do_not_count(all_kernels: Path) -> None:
    chosen = ("--case", "embedding", "--size", "a whole gradient past the caches", "--dtype", "fp32")
    done = run("-m", "tests.cuda_emulator", "--library", all_kernels, *chosen)
    assert (done.returncode, done.stdout.split(":")[0]) == (NOTHING_RAN, "nothing embedding"), done.stdout + done.stderr


# Where the CPU says which number is wrong, a GPU would have to stop its queue to find out: what comes of it is NaN, and only there.
WRONG_NUMBERS = """
import sys, torch
from pathlib import Path
from tempfile import TemporaryDirectory
from tests.cuda_emulator.__main__ import use_library
with TemporaryDirectory() as scratch:
    use_library(Path(sys.argv[1]), Path(scratch))
from dist_llm.kernels.attention.native import attention_native, attention_native_lse
from dist_llm.kernels.cross_entropy.native import cross_entropy_native

for target in (8, -1, 2**40):
    logits = torch.randn(3, 8, requires_grad=True)
    loss = cross_entropy_native(logits, torch.tensor([1, target, 7]), ignore=-100)
    loss.backward()
    assert loss.isnan() and logits.grad[1].isnan().all() and logits.grad[[0, 2]].isfinite().all()
for dtype in (torch.float32, torch.bfloat16):
    q, k, v = (torch.randn(2, 4, 2, 8).to(dtype) for _ in range(3))
    out, lse = attention_native_lse(q, k, v, causal=True, doc_ids=torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]))
    assert out[0].isnan().all() and lse[0].isnan().all() and out[1].isfinite().all() and lse[1].isfinite().all()
    ids = {"doc_ids": torch.zeros(2, 4).long(), "query_doc_ids": torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1]])}
    out, lse = attention_native_lse(q, k, v, causal=False, **ids)
    assert out[1].isnan().all() and lse[1].isnan().all() and out[0].isfinite().all() and lse[0].isfinite().all()
try:
    attention_native(*(torch.randn(1, 2, 1, 257) for _ in range(3)), causal=True)
except RuntimeError as error:
    assert "takes head dims up to 256, not 257" in str(error)
else:
    raise AssertionError("a head dim of 257 was taken")
"""


def test_wrong_targets_and_documents_on_cuda_are_nan(all_kernels: Path) -> None:
    done = run("-c", WRONG_NUMBERS, all_kernels)
    assert done.returncode == 0, done.stdout + done.stderr


# What each fault of faults.cu is called, in the order of its enumeration, and what is said of it.
FAULTS = {
    "none": "right",
    "no_barrier": "with no barrier between|reads shared memory that nobody wrote",
    "barrier_in_a_branch": "has left the kernel",
    "barrier_after_leaving": "thread (5, 0, 0) has left the kernel",
    "two_barriers": "at another",
    "index_past_array": "index 96 is outside its array at ",
    "past_dynamic_shared": "thread (95, 0, 0) writes outside the arrays of shared memory",
    "nobody_wrote": "reads shared memory that nobody wrote|at another",
    "misaligned": "is not a multiple of 16 at csrc/common/cuda_launch.h",
    "lane_left_out": "which has left the kernel",
    "lanes_elsewhere": "which waits in __shfl_",
    "no_warp_barrier": "with no barrier between|reads shared memory that nobody wrote",
    "copy_not_waited_for": "reads shared memory that nobody wrote",
    "copy_without_barrier": "with no barrier between|reads shared memory that nobody wrote",
    "too_much_shared": "65536 bytes of dynamic shared memory, allowed are 49152",
    "order_of_blocks": "what another block of the launch wrote in global memory",
    "result_not_written": "nan",
    "empty_grid": "a grid of (0, 1, 1) blocks",
    "copy_left_over": "ends with cp.async copies that it never waited for",
    "past_result": "thread (95, 0, 0) writes 4 bytes at 384 of a tensor of 384 bytes",
    "before_argument": "thread (0, 0, 0) reads 4 bytes at -4 of a tensor of 384 bytes",
    "no_barrier_in_global_memory": "with no barrier between in global memory",
}

FIND_FAULTS = """
import ctypes, json, sys, torch
torch.library.define("dist_llm_faults::reverse", "(Tensor x, int fault) -> Tensor")
torch.ops.load_library(sys.argv[1])
ctypes.CDLL(sys.argv[1]).dl_guard_tensors()
torch.use_deterministic_algorithms(True)  # new tensors are NaN
x, said = torch.arange(96.0), []
for fault in range(int(sys.argv[2])):
    try:
        results = [torch.ops.dist_llm_faults.reverse(x, fault) for _ in range(4)]
    except RuntimeError as error:
        said.append(str(error))
        continue
    if any(result.isnan().any() for result in results):
        said.append("nan")
    else:
        said.append("right" if torch.equal(results[0], x.flip(0)) else "wrong")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def faults() -> Path:
    return emulator.build([EMULATOR / "faults.cu"])


def test_every_fault_is_found_and_named(faults: Path) -> None:
    done = run("-c", FIND_FAULTS, faults, len(FAULTS))
    assert done.returncode == 0, done.stderr
    said = dict(zip(FAULTS, json.loads(done.stdout), strict=True))
    missed = {name: said[name] for name, expected in FAULTS.items() if not any(part in said[name] for part in expected.split("|"))}
    assert not missed


MULTIPLY = """
import sys, torch
torch.library.define("dist_llm_faults::product", "(Tensor a, Tensor b) -> Tensor")
torch.ops.load_library(sys.argv[1])
for dtype in (torch.bfloat16, torch.float16):
    a, b = (torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(1)).to(dtype) for shape in ((16, 16), (16, 8)))
    assert torch.equal(torch.ops.dist_llm_faults.product(a, b), a.float() @ b.float())
"""


def test_fragments_of_a_matrix_product_are_where_the_instructions_want_them(faults: Path) -> None:
    done = run("-c", MULTIPLY, faults)
    assert done.returncode == 0, done.stderr


ROUND = """
import sys, torch
torch.library.define("dist_llm_faults::rounded", "(Tensor x) -> (Tensor, Tensor, Tensor)")
torch.ops.load_library(sys.argv[1])
bits = torch.randint(-2**31, 2**31, (20000,), generator=torch.Generator().manual_seed(1)).int()
halves = torch.arange(65536).short().view(torch.float16).float()  # every number of fp16, and the middles between them
x = torch.cat([bits.view(torch.float32), halves, (halves[:-1] + halves[1:]) / 2, torch.tensor([65519.9, 65520.0, 2.0**-25, 3 * 2.0**-26])])
brain, half, back = torch.ops.dist_llm_faults.rounded(x)
for ours, theirs in ((brain, x.bfloat16()), (half, x.half()), (back, x.half().float())):
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(0, 1, -1), theirs.nan_to_num(0, 1, -1))
"""


def test_numbers_are_rounded_as_torch_rounds_them(faults: Path) -> None:
    done = run("-c", ROUND, faults)
    assert done.returncode == 0, done.stderr


def test_a_barrier_taken_out_of_a_kernel_is_missed() -> None:
    change = ("  if (lane == 0) scratch[warp] = value;\n  __syncthreads();\n", "  if (lane == 0) scratch[warp] = value;\n")
    library = emulator.build([emulator.CSRC / "rms_norm/rms_norm_cuda.cu"], changes={"common/cuda_launch.h": change})
    done = run("-m", "tests.cuda_emulator", "--library", library, "--case", "rms_norm", "--size", "odd", "--dtype", "fp32")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "reads shared memory that nobody wrote" in done.stdout or "with no barrier between" in done.stdout


def test_arrays_of_shared_memory_are_translated() -> None:
    translated = emulator.translate(
        "  __shared__ __align__(16) float a[kRows][4], b[2];\n  __shared__ Stats<int, 2> one;\n#define X __shared__ int y;\n"
    )
    first, second, third, _ = translated.split("\n")
    assert "auto& a = ::cuda_emulator::shared<float[(kRows)][(4)]>(" in first and ", 16);" in first
    assert "auto& b = ::cuda_emulator::shared<float[(2)]>(" in first
    assert "auto& one = ::cuda_emulator::shared<Stats<int, 2>>(" in second
    assert third == "#define X __shared__ int y;"
