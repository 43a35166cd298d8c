"""RMSNorm: the definition against torch, and what only this op has; tests/kernels/cases/rms_norm.py holds it to what all ops must have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dist_llm.kernels.rms_norm.native import rms_norm_native, rms_norm_residual_native, why_not_native
from dist_llm.kernels.rms_norm.reference import rms_norm_reference, rms_norm_residual_reference
from tests.kernels.recorder import Recorder

CPU = torch.device("cpu")
EPS = 1e-5

needs_native = pytest.mark.skipif(why_not_native(CPU, torch.float32) is not None, reason=str(why_not_native(CPU, torch.float32)))


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """x, residual, weight, and a gradient of the norm."""
    generator = torch.Generator().manual_seed(7)
    x, residual, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    weight = (1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(dtype)
    return [x, residual, weight, dy]


def test_reference_equals_torch_in_float64() -> None:
    x, _, weight, _ = make_inputs((6, 33), torch.float64)
    torch.testing.assert_close(rms_norm_reference(x, weight, EPS), torch.nn.functional.rms_norm(x, (33,), weight, EPS), rtol=1e-13, atol=0)


def test_reference_gradients_are_those_of_finite_differences() -> None:
    x, residual, weight, _ = (t.requires_grad_() for t in make_inputs((3, 5), torch.float64))
    assert torch.autograd.gradcheck(lambda *a: rms_norm_residual_reference(*a, EPS), (x, residual, weight))


def test_reference_computes_bf16_in_fp32_and_rounds_once() -> None:
    x, _, weight, _ = make_inputs((9, 200), torch.bfloat16)
    assert torch.equal(rms_norm_reference(x, weight, EPS), rms_norm_reference(x.float(), weight.float(), EPS).bfloat16())


@needs_native
def test_native_takes_the_expanded_gradient_of_a_sum() -> None:
    x, _, weight, _ = make_inputs((4, 12), torch.float32)
    results = []
    for fn in (rms_norm_native, rms_norm_reference):
        leaf = x.clone().requires_grad_()
        fn(leaf, weight, EPS).sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("used", [0, 1], ids=["only the norm", "only the sum"])
def test_native_residual_gradient_is_right_when_one_result_is_unused(used: int) -> None:
    x, residual, weight, dy = make_inputs((4, 12), torch.float32)
    results = []
    for fn in (rms_norm_residual_native, rms_norm_residual_reference):
        leaf = residual.clone().requires_grad_()
        fn(x, leaf, weight, EPS)[used].backward(dy)
        results.append(leaf.grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("used", [0, 1], ids=["only the norm", "only the sum"])
def test_native_makes_no_zeros_for_a_result_that_is_unused(used: int) -> None:
    x, residual, weight, dy = make_inputs((4, 12), torch.float32)
    result = rms_norm_residual_native(x.requires_grad_(), residual, weight, EPS)[used]
    with Recorder() as seen:
        result.backward(dy)
    assert seen.ops and seen.zeros == []


@needs_native
def test_native_sum_is_bit_equal_to_the_addition_of_torch() -> None:
    # A sum of two bf16 numbers is often a tie; torch rounds it to even.
    x, residual, weight, _ = make_inputs((64, 100), torch.bfloat16)
    assert torch.equal(rms_norm_residual_native(x, residual, weight, EPS)[1], x + residual)


@needs_native
@pytest.mark.parametrize("shape", [(2100, 1024), (2051, 1024), (4099, 513)], ids=str)
def test_native_is_right_where_results_are_stored_past_the_caches(shape: tuple[int, ...]) -> None:
    # 4 MiB and more; the last shape's rows are not whole cache lines, so it must not.
    x, residual, weight, dy = make_inputs(shape, torch.bfloat16)
    results = []
    for fn in (rms_norm_residual_native, rms_norm_residual_reference):
        leaf = x.clone().requires_grad_()
        y, _ = fn(leaf, residual, weight, EPS)
        y.backward(dy)
        results.append([y.detach().float(), leaf.grad.float()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-9)


@needs_native
def test_native_keeps_a_nan_visible() -> None:
    x, _, weight, _ = make_inputs((3, 40), torch.bfloat16)
    x[1, 39] = float("nan")
    y = rms_norm_native(x, weight, EPS)
    assert y[1].isnan().all()
    assert torch.isfinite(y[[0, 2]]).all()


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
    x, _, weight, _ = make_inputs((4, 8), torch.float32)
    with pytest.raises(RuntimeError, match=message):
        rms_norm_native(*change(x, weight), EPS)


@needs_native
def test_native_refuses_a_residual_of_another_dtype_or_shape() -> None:
    x, residual, weight, _ = make_inputs((4, 8), torch.float32)
    with pytest.raises(RuntimeError, match="residual is BFloat16 but x is Float"):
        rms_norm_residual_native(x, residual.bfloat16(), weight, EPS)
    with pytest.raises(RuntimeError, match=r"residual \(3, 8\) must have the shape of x \(4, 8\)"):
        rms_norm_residual_native(x, residual[:3], weight, EPS)


def test_why_not_native_names_the_dtypes_it_takes() -> None:
    assert "float64" in str(why_not_native(CPU, torch.float64))
    assert "torch.bfloat16" in str(why_not_native(CPU, torch.float64))
