"""RMSNorm: the definition against torch, and the compiled kernels against the definition, by their error from float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dist_llm.kernels.extension import load_extension
from dist_llm.kernels.rms_norm.native import rms_norm_native, rms_norm_residual_native, why_not_native
from dist_llm.kernels.rms_norm.reference import rms_norm_reference, rms_norm_residual_reference

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[2]
EPS = 1e-5
SHAPES = [(5, 123, 123), (1, 64), (7, 1), (3, 40), (1,), (40,), (0, 16), (300, 257), (2, 1024)]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]

needs_native = pytest.mark.skipif(why_not_native(CPU, torch.float32) is not None, reason=str(why_not_native(CPU, torch.float32)))


def make_inputs(shape: tuple[int, ...], x_dtype: torch.dtype, weight_dtype: torch.dtype) -> list[torch.Tensor]:
    """x, residual, weight, and gradients of the norm and of the sum."""
    generator = torch.Generator().manual_seed(7)
    x, residual, dy, dsummed = (torch.randn(shape, generator=generator).to(x_dtype) for _ in range(4))
    weight = (1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(weight_dtype)
    return [x, residual, weight, dy, dsummed]


def plain_results(fn: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """y, dx, dweight."""
    x, _, weight, dy, _ = inputs
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = fn(x, weight, EPS)
    return [y.detach(), *torch.autograd.grad(y, [x, weight], dy)]


def residual_results(fn: Callable[..., tuple[torch.Tensor, torch.Tensor]], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """y, summed, dx, dresidual, dweight."""
    x, residual, weight, dy, dsummed = inputs
    x, residual, weight = (t.clone().requires_grad_() for t in (x, residual, weight))
    y, summed = fn(x, residual, weight, EPS)
    grads = torch.autograd.grad([y, summed], [x, residual, weight], [dy, dsummed])
    return [y.detach(), summed.detach(), *grads]


FORMS = {
    "plain": (plain_results, rms_norm_reference, rms_norm_native),
    "residual": (residual_results, rms_norm_residual_reference, rms_norm_residual_native),
}


def largest_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return (value.double() - exact).abs().max().item() if exact.numel() else 0.0


def term_size(inputs: list[torch.Tensor]) -> float:
    """The largest sum of the sizes of the terms that are added to any one number of a result."""
    x, residual, weight, dy, dsummed = (t.double().abs() for t in inputs)
    rstd = max((t.double().square().mean(-1) + EPS).rsqrt().max().item() for t in (inputs[0], inputs[0] + inputs[1]))
    along_rows = (dy * (x + residual) * rstd).reshape(-1, x.shape[-1]).sum(0)
    return max(t.max().item() for t in (x + residual, 2 * rstd * weight * dy + dsummed, along_rows))


def assert_at_most_twice_the_reference_error(form: str, inputs: list[torch.Tensor]) -> None:
    results, reference, native = FORMS[form]
    exact = results(reference, [t.double() for t in inputs])
    expected, measured = results(reference, inputs), results(native, inputs)
    assert len(measured) == len(exact) == len(expected)
    # One rounding of rstd is shared by a whole row, so with a handful of rows the largest error is luck; and at D = 1 the gradient
    # is a difference of equal numbers. There, two fp32 roundings of the terms that are added are no error. From 64 rows on
    # the reference's own error is the measure.
    rows = inputs[0].numel() // inputs[0].shape[-1]
    luck = 2 * torch.finfo(torch.float32).eps * term_size(inputs) if 0 < rows < 64 else 0.0
    for index, (ours, theirs, truth) in enumerate(zip(measured, expected, exact, strict=True)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.isfinite(ours).all()
        assert largest_error(ours, truth) <= max(2 * largest_error(theirs, truth), luck), f"result {index} of {form}"


def test_reference_equals_torch_in_float64() -> None:
    x, _, weight, _, _ = (t.double() for t in make_inputs((6, 33), torch.float32, torch.float32))
    torch.testing.assert_close(rms_norm_reference(x, weight, EPS), torch.nn.functional.rms_norm(x, (33,), weight, EPS), rtol=1e-13, atol=0)


def test_reference_gradients_are_those_of_finite_differences() -> None:
    x, residual, weight, _, _ = (t.double().requires_grad_() for t in make_inputs((3, 5), torch.float32, torch.float32))
    assert torch.autograd.gradcheck(lambda *a: rms_norm_residual_reference(*a, EPS), (x, residual, weight))


def test_reference_computes_bf16_in_fp32_and_rounds_once() -> None:
    x, _, weight, _, _ = make_inputs((9, 200), torch.bfloat16, torch.bfloat16)
    assert torch.equal(rms_norm_reference(x, weight, EPS), rms_norm_reference(x.float(), weight.float(), EPS).bfloat16())


@needs_native
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_error_is_at_most_twice_the_reference_error(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], form: str
) -> None:
    assert_at_most_twice_the_reference_error(form, make_inputs(shape, *dtypes))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or why_not_native(CUDA, torch.float32) is not None, reason="no GPU, or no CUDA kernels built"
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", [*DTYPES, (torch.float16, torch.float16)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1200, 4096), (3, 40000)], ids=str)
def test_native_error_on_gpu_is_at_most_twice_the_reference_error(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], form: str
) -> None:
    assert_at_most_twice_the_reference_error(form, [t.cuda() for t in make_inputs(shape, *dtypes)])


@needs_native
@pytest.mark.parametrize("form", FORMS)
def test_native_accepts_any_strides(form: str) -> None:
    inputs = make_inputs((6, 10, 24), torch.float32, torch.float32)
    results, _, native = FORMS[form]
    scattered = [t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t for t in inputs]
    assert not scattered[0].is_contiguous()
    for ours, same in zip(results(native, scattered), results(native, inputs), strict=True):
        assert torch.equal(ours, same)


@needs_native
def test_native_takes_the_expanded_gradient_of_a_sum() -> None:
    x, _, weight, _, _ = make_inputs((4, 12), torch.float32, torch.float32)
    results = []
    for fn in (rms_norm_native, rms_norm_reference):
        leaf = x.clone().requires_grad_()
        fn(leaf, weight, EPS).sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("used", [0, 1], ids=["only the norm", "only the sum"])
def test_native_residual_gradient_is_right_when_one_result_is_unused(used: int) -> None:
    x, residual, weight, dy, _ = make_inputs((4, 12), torch.float32, torch.float32)
    results = []
    for fn in (rms_norm_residual_native, rms_norm_residual_reference):
        leaf = residual.clone().requires_grad_()
        fn(x, leaf, weight, EPS)[used].backward(dy)
        results.append(leaf.grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("form", FORMS)
def test_native_gives_the_same_bits_twice_and_at_any_number_of_threads(form: str) -> None:
    inputs = make_inputs((700, 96), torch.bfloat16, torch.float32)
    results, _, native = FORMS[form]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, again = results(native, inputs), results(native, inputs)
        torch.set_num_threads(3)
        threaded = results(native, inputs)
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(first, again, threaded, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors are born full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(8).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@needs_native
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5, 123), (2, 1), (33, 64), (0, 16)], ids=str)
def test_native_writes_every_element_of_every_result(shape: tuple[int, ...], form: str) -> None:
    results, _, native = FORMS[form]
    for dtypes in DTYPES:
        for result in results(native, make_inputs(shape, *dtypes)):
            assert torch.isfinite(result).all()


@needs_native
def test_native_keeps_a_nan_visible() -> None:
    x, _, weight, _, _ = make_inputs((3, 40), torch.bfloat16, torch.bfloat16)
    x[1, 39] = float("nan")
    y = rms_norm_native(x, weight, EPS)
    assert y[1].isnan().all()
    assert torch.isfinite(y[[0, 2]]).all()


@needs_native
def test_opcheck_accepts_every_op() -> None:
    for dtypes in DTYPES[1:]:
        x, residual, weight, dy, dsummed = make_inputs((3, 8), *dtypes)
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
        rstd = torch.ops.dist_llm.rms_norm(x, weight, EPS)[1]
        torch.library.opcheck(torch.ops.dist_llm.rms_norm, (leaves[0], leaves[2], EPS))
        torch.library.opcheck(torch.ops.dist_llm.rms_norm_residual, (*leaves, EPS))
        torch.library.opcheck(torch.ops.dist_llm.rms_norm_backward, (dy, x, weight, rstd, dsummed))
        torch.library.opcheck(torch.ops.dist_llm.rms_norm_backward, (dy, x, weight, rstd, None))


@needs_native
@pytest.mark.parametrize("form", FORMS)
def test_native_compiles_as_one_graph_with_equal_results(form: str) -> None:
    results, _, native = FORMS[form]
    inputs = make_inputs((6, 40), torch.float32, torch.float32)
    # aot_eager traces forward and backward through the fake kernels without generating code: the op is what is tested.
    compiled = torch.compile(native, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(results(compiled, inputs), results(native, inputs), strict=True):
        assert torch.equal(traced, eager)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x.double(), w), "takes x in fp32 or bf16"),
        (lambda x, w: (x, w[:-1]), r"weight \(7\) must have the last dimension of x \(4, 8\)"),
        (lambda x, w: (x[:, :0], w[:0]), "last dimension of at least 1"),
    ],
)
def test_native_refuses_what_it_cannot_do(change: Callable[..., tuple[torch.Tensor, torch.Tensor]], message: str) -> None:
    x, _, weight, _, _ = make_inputs((4, 8), torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        rms_norm_native(*change(x, weight), EPS)


@needs_native
def test_native_refuses_a_residual_of_another_dtype_or_shape() -> None:
    x, residual, weight, _, _ = make_inputs((4, 8), torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match="residual is BFloat16 but x is Float"):
        rms_norm_residual_native(x, residual.bfloat16(), weight, EPS)
    with pytest.raises(RuntimeError, match=r"residual \(3, 8\) must have the shape of x \(4, 8\)"):
        rms_norm_residual_native(x, residual[:3], weight, EPS)


def test_why_not_native_names_the_dtypes_it_takes() -> None:
    assert "float64" in str(why_not_native(CPU, torch.float64))
    assert "torch.bfloat16" in str(why_not_native(CPU, torch.float64))


# The instructions are chosen once in a process, so each set is tried in its own.
CHECK_ISA = """
from dist_llm.kernels.extension import load_extension
from tests.kernels.test_rms_norm import DTYPES, assert_at_most_twice_the_reference_error, make_inputs
print(load_extension().cpu_isa)
for form in ("plain", "residual"):
    for dtypes in DTYPES:
        for shape in ((5, 123, 123), (7, 1), (3, 40), (33, 64)):
            assert_at_most_twice_the_reference_error(form, make_inputs(shape, *dtypes))
"""


def run_with_isa(isa: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHECK_ISA]
    environment = {**os.environ, "DIST_LLM_CPU_ISA": isa}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@needs_native
@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_native_is_as_exact_with_older_instructions(isa: str) -> None:
    order = ["avx512", "avx2", "generic"]
    if order.index(isa) < order.index(str(load_extension().cpu_isa)):
        pytest.skip(f"this processor, or DIST_LLM_CPU_ISA, stops at {load_extension().cpu_isa}")
    done = run_with_isa(isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


@needs_native
def test_unknown_instructions_are_refused_with_the_choices() -> None:
    done = run_with_isa("avx1024")
    assert done.returncode != 0
    assert "ConfigError: DIST_LLM_CPU_ISA=avx1024 cannot run on this processor; choose one of auto" in done.stderr
    assert "generic" in done.stderr.splitlines()[-1]
