"""Every op, in every implementation, dtype and odd shape: as exact as its reference, deterministic, whole, and known to torch's compiler.

What only one op has is tested beside it; what all must have is here, so that a new op is held to it by one file in ``cases/``.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_llm.kernels.extension import load_extension
from dist_llm.kernels.impl import Impl
from dist_llm.kernels.table import LAYOUT_TABLES, TABLES
from tests.kernels.case import Case, Sample, all_cases, assert_close_to_float64, results

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


def first_runnable(case: Case, device: torch.device = CPU) -> tuple[Impl, list[torch.dtype]]:
    """The first implementation but the reference that runs on the device, and the dtypes it takes.

    Where the extension is loaded, there is one: a case that ran nothing would be green whatever is wrong. That a processor lacks the
    instructions for it is the one other reason to skip the test.
    """
    for impl in case.impls[:-1]:
        taken = [dtype for dtype in case.dtypes if impl.why_not(device, dtype) is None]
        if taken:
            return impl, taken
    reasons = "; ".join(f"{impl.name}: {impl.why_not(device, dtype)}" for impl in case.impls[:-1] for dtype in case.dtypes)
    if load_extension().loaded and "processor" not in reasons:
        pytest.fail(f"no implementation of {case.name} but the reference runs on {device.type}: {reasons}")
    pytest.skip(reasons)


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


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The same numbers with the first two dimensions the other way round in memory."""
    return t if t.dim() < 2 else t.transpose(0, 1).contiguous().transpose(0, 1)


def spaced(t: torch.Tensor) -> torch.Tensor:
    """The same numbers with a gap behind each. An empty tensor has none."""
    return t if t.dim() == 0 or t.numel() == 0 else torch.stack((t, t), -1)[..., 0]


# Ways for arguments and arriving gradients to lie in memory. One-dimensional ones (weights, biases, statistics of rows) may be refused.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": transposed,
    "spaced": lambda t: spaced(t) if t.dim() > 1 else t,
    "vectors spaced": lambda t: spaced(t) if t.dim() == 1 else t,
}


def check_strides(case: Case, impl: Impl, sample: Sample, layout: str) -> int:
    """Gives how many arguments and arriving gradients lay otherwise."""
    moved = []

    def lie(t: torch.Tensor) -> torch.Tensor:
        laid = LAYOUTS[layout](t)
        moved.append(laid.stride() != t.stride())
        return laid

    plain = results(impl.fn, sample)
    try:
        # What a function writes into stays as it is: its layout is the caller's.
        scattered = results(impl.fn, sample.map(lie, but=sample.changed), arriving_as=lie)
    except RuntimeError as error:
        assert layout == "vectors spaced" and "must be contiguous" in str(error), f"{case.name} {impl.name} {layout}: {error}"
    else:
        assert all(map(torch.equal, plain, scattered)), f"{case.name} {impl.name} {layout}"
    return sum(moved)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "impl"), FAST, ids=name_of)
def test_results_are_the_same_at_any_strides(case: Case, impl: Impl, layout: str) -> None:
    dtype = runnable(impl, case.dtypes)[0]
    moved = sum([check_strides(case, impl, case.make(size, dtype), layout) for size in case.sizes.values()])
    if moved == 0 and layout == "vectors spaced":
        pytest.skip("it takes no vectors")
    assert moved > 0, f"no argument of {case.name} lay otherwise"


@needs_extension
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_opcheck_accepts_the_ops_of_every_case(case: Case) -> None:
    if any(impl.name == "native" for impl in case.impls):  # whose the ops are
        case = replace(case, impls=tuple(impl for impl in case.impls if impl.name == "native" or impl is case.impls[-1]))
    checks = [check for dtype in first_runnable(case)[1] for check in case.checks(dtype)]
    assert checks or not any(case.checks(dtype) for dtype in case.dtypes), "no implementation runs in a dtype that has checks"
    for op, arguments in checks:
        torch.library.opcheck(op, arguments)


@needs_extension
def test_every_op_is_in_the_checks_of_a_case() -> None:
    checked = {str(op).split(".")[1] for case in CASES for dtype in case.dtypes for op, _ in case.checks(dtype)}
    names = [name.removeprefix("dist_llm::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("dist_llm::")]
    # Those of the processor take no tensors; what has no schema was built for another version of the package.
    assert checked == {name for name in names if hasattr(torch.ops.dist_llm, name) and not name.startswith("cpu_")}


@pytest.mark.parametrize(("case", "impl"), FAST, ids=name_of)
def test_it_compiles_as_one_graph_with_equal_results(case: Case, impl: Impl) -> None:
    dtype = runnable(impl, case.dtypes)[0]
    if (case.name, impl.name) == ("adamw_step", "torch"):
        pytest.skip("torch does not let torch.compile into its fused optimisers")
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


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_wrong_result_is_noticed(case: Case) -> None:
    """Each result in turn: in bf16 an output 2 % and a gradient 10 % off, in a case of fp32 either by 1e-4; whole numbers by one."""
    for dtype in case.dtypes:
        sample = case.make(next(iter(case.sizes.values())), dtype)
        exact, expected = results(case.reference, sample.double()), results(case.reference, sample)
        assert_close_to_float64(expected, expected, exact, sample, "the reference")
        for index, right in enumerate(expected):
            is_output = index < len(expected) - len(sample.wanted)
            part = 1e-4 if dtype == torch.float32 and right.dtype != torch.bfloat16 else 0.02 if is_output else 0.1
            wrong = right * (1 + part) if right.is_floating_point() else right + 1
            with pytest.raises(AssertionError, match=f"result {index} of a mutant in {dtype}(: error| differs)"):
                assert_close_to_float64([*expected[:index], wrong, *expected[index + 1 :]], expected, exact, sample, f"a mutant in {dtype}")


# Implementations that have no case, and why. The name alone of a table's function says nothing of which ones run.
NOT_IN_A_CASE = {
    ("attention", "sdpa"): "rounds probabilities in every step; held to a bound of its own in test_attention_op.py",
}


@pytest.mark.parametrize("function", [*TABLES, *LAYOUT_TABLES])
def test_every_function_that_layers_can_ask_for_has_a_case(function: str) -> None:
    table = {**TABLES, **LAYOUT_TABLES}[function]
    cases = [case for case in CASES if case.name == function]
    assert cases, f"no case in tests/kernels/cases/ has the name {function}"
    for case in cases:
        # A case may wrap the functions to hand their arguments over one by one.
        run = [inspect.unwrap(impl.fn) for impl in case.impls]
        assert run[-1] is inspect.unwrap(table[-1].fn)
        missing = [impl.name for impl in table if inspect.unwrap(impl.fn) not in run and (function, impl.name) not in NOT_IN_A_CASE]
        assert not missing, f"{function}: {missing} are in no case"
