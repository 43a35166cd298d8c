"""Every op, in every implementation, dtype and odd shape: as exact as its reference, deterministic, whole, and known to torch's compiler.

What only one op has is tested beside it; what all must have is here, so that a new op is held to it by one file in ``cases/``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_llm.kernels.extension import load_extension
from dist_llm.kernels.impl import Impl
from tests.kernels.case import Case, all_cases, assert_close_to_float64, results

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]
CASES = all_cases()
FAST = [(case, impl) for case in CASES for impl in case.impls[:-1]]

needs_extension = pytest.mark.skipif(not load_extension().loaded, reason=str(load_extension().why_not))


def name_of(value: object) -> str:
    """What pytest shows of a parameter."""
    return value.name if isinstance(value, (Case, Impl)) else str(value)


def runnable(impl: Impl, dtypes: tuple[torch.dtype, ...], device: torch.device = CPU) -> list[torch.dtype]:
    """The dtypes that the implementation takes; where there is none the test is skipped, with the reason."""
    taken = [dtype for dtype in dtypes if impl.why_not(device, dtype) is None]
    if not taken:
        pytest.skip(f"{impl.name} on {device.type}: {impl.why_not(device, dtypes[0])}")
    return taken


def assert_as_exact_as_the_reference(case: Case, impl: Impl, size: str, dtype: torch.dtype, device: torch.device = CPU) -> None:
    sample = case.make({**case.sizes, **case.gpu_sizes}[size], dtype).map(lambda t: t.to(device))
    exact, expected = results(case.reference, sample.double()), results(case.reference, sample)
    assert_close_to_float64(results(impl.fn, sample), expected, exact, sample, f"{case.name} {impl.name} {size} {dtype} {device.type}")


@pytest.mark.parametrize(("case", "impl"), FAST, ids=name_of)
def test_error_is_at_most_twice_the_reference_error(case: Case, impl: Impl) -> None:
    for dtype in runnable(impl, case.dtypes):
        for size in case.sizes:
            assert_as_exact_as_the_reference(case, impl, size, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("case", "impl"), FAST, ids=name_of)
def test_error_on_a_gpu_is_at_most_twice_the_reference_error(case: Case, impl: Impl) -> None:
    for dtype in runnable(impl, (*case.dtypes, *case.gpu_dtypes), CUDA):
        for size in (*case.sizes, *case.gpu_sizes):
            assert_as_exact_as_the_reference(case, impl, size, dtype, CUDA)


@pytest.mark.parametrize(("case", "impl"), FAST, ids=name_of)
def test_the_same_bits_twice_and_at_any_number_of_threads(case: Case, impl: Impl) -> None:
    threads = torch.get_num_threads()
    for dtype in runnable(impl, case.dtypes):
        for size in case.sizes.values():
            sample = case.make(size, dtype)
            try:
                torch.set_num_threads(1)
                first, again = results(impl.fn, sample), results(impl.fn, sample)
                torch.set_num_threads(3)
                threaded = results(impl.fn, sample)
            finally:
                torch.set_num_threads(threads)
            for one, two, three in zip(first, again, threaded, strict=True):
                assert torch.equal(one, two) and torch.equal(one, three), f"{case.name} {impl.name} {size} {dtype}"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors are born full of NaN, or of the largest whole number."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(8).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("case", "impl"), FAST, ids=name_of)
def test_every_element_of_every_result_is_written(case: Case, impl: Impl, poisoned_memory: None) -> None:
    for dtype in runnable(impl, case.dtypes):
        for size in case.sizes.values():
            sample = case.make(size, dtype)
            for index, (result, expected) in enumerate(zip(results(impl.fn, sample), results(case.reference, sample), strict=True)):
                where = f"result {index} of {case.name} {impl.name} {size} {dtype}"
                if result.is_floating_point():
                    assert torch.isfinite(result).all(), where
                else:
                    assert torch.equal(result, expected), where


@pytest.mark.parametrize(("case", "impl"), FAST, ids=name_of)
def test_arguments_of_any_strides_are_accepted(case: Case, impl: Impl) -> None:
    def scatter(t: torch.Tensor) -> torch.Tensor:
        return t if t.dim() < 2 else t.transpose(0, 1).contiguous().transpose(0, 1)

    dtype = runnable(impl, case.dtypes)[0]
    for size in case.sizes.values():
        sample = case.make(size, dtype)
        if sample.changed:
            continue  # a function that writes into its arguments takes them as they lie in memory
        for plain, scattered in zip(results(impl.fn, sample), results(impl.fn, sample.map(scatter)), strict=True):
            assert torch.equal(plain, scattered), f"{case.name} {impl.name} {size}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_opcheck_accepts_every_op(case: Case) -> None:
    for dtype in runnable(case.impls[0], case.dtypes):
        for op, arguments in case.checks(dtype):
            torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_it_compiles_as_one_graph_with_equal_results(case: Case) -> None:
    impl = case.impls[0]
    dtype = runnable(impl, case.dtypes)[0]
    sample = case.make(next(iter(case.sizes.values())), dtype)
    torch._dynamo.reset()
    # aot_eager traces forward and backward through the fake kernels without generating code: the op is what is tested.
    compiled = torch.compile(impl.fn, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(results(compiled, sample), results(impl.fn, sample), strict=True):
        assert torch.equal(traced, eager), case.name


# The instructions are chosen once in a process, so each set is tried in its own, for all ops together.
CHECK_ISA = """
import torch
from dist_llm.kernels.extension import load_extension
from tests.kernels.test_every_op import CPU, FAST, assert_as_exact_as_the_reference
print(load_extension().cpu_isa)
for case, impl in FAST:
    for dtype in case.dtypes:
        if impl.name == "native" and impl.why_not(CPU, dtype) is None:
            for size in case.sizes:
                assert_as_exact_as_the_reference(case, impl, size, dtype)
"""


def run_with_isa(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DIST_LLM_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", CHECK_ISA], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@needs_extension
@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_older_instructions_are_as_exact(isa: str) -> None:
    order = ["avx512", "avx2", "generic"]
    if order.index(isa) < order.index(str(load_extension().cpu_isa)):
        pytest.skip(f"this processor, or DIST_LLM_CPU_ISA, stops at {load_extension().cpu_isa}")
    done = run_with_isa(isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


@needs_extension
def test_unknown_instructions_are_refused_with_the_choices() -> None:
    done = run_with_isa("avx1024")
    assert done.returncode != 0
    assert "ConfigError: DIST_LLM_CPU_ISA=avx1024 cannot run on this processor; choose one of auto" in done.stderr
    assert "generic" in done.stderr.splitlines()[-1]


def test_a_wrong_implementation_is_noticed() -> None:
    case = next(c for c in CASES if c.name == "rms_norm")
    sample = case.make((5, 40), torch.float32)
    exact, expected = results(case.reference, sample.double()), results(case.reference, sample)
    wrong = [*expected[:-1], expected[-1] * (1 + 1e-4)]
    with pytest.raises(AssertionError, match="result 2 of a mutant: error"):
        assert_close_to_float64(wrong, expected, exact, sample, "a mutant")
