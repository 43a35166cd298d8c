"""LayerNorm: the definition against torch, and what only this op has; cases/layer_norm.py holds it to what all ops must have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dist_llm.kernels.layer_norm.native import layer_norm_native, layer_norm_residual_native, why_not_native
from dist_llm.kernels.layer_norm.reference import layer_norm_reference, layer_norm_residual_reference
from tests.kernels.recorder import Recorder

CPU = torch.device("cpu")
EPS = 1e-5

needs_native = pytest.mark.skipif(why_not_native(CPU, torch.float32) is not None, reason=str(why_not_native(CPU, torch.float32)))


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """x, residual, weight, bias, and a gradient of the norm."""
    generator = torch.Generator().manual_seed(7)
    x, residual, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    weight, bias = (1 + 0.3 * torch.randn(2, shape[-1], generator=generator)).to(dtype)
    return [x, residual, weight, bias, dy]


@pytest.mark.parametrize("with_bias", [True, False])
def test_reference_equals_torch_in_float64(with_bias: bool) -> None:
    x, _, weight, bias, _ = make_inputs((6, 33), torch.float64)
    expected = F.layer_norm(x, (33,), weight, bias if with_bias else None, EPS)
    torch.testing.assert_close(layer_norm_reference(x, weight, bias if with_bias else None, EPS), expected, rtol=1e-12, atol=1e-13)


def test_reference_gradients_are_those_of_finite_differences() -> None:
    x, residual, weight, bias, _ = (t.requires_grad_() for t in make_inputs((3, 5), torch.float64))
    assert torch.autograd.gradcheck(lambda *a: layer_norm_residual_reference(*a, EPS), (x, residual, weight, bias))


def test_reference_computes_bf16_in_fp32_and_rounds_once() -> None:
    x, _, weight, bias, _ = make_inputs((9, 200), torch.bfloat16)
    wide = layer_norm_reference(x.float(), weight.float(), bias.float(), EPS)
    assert torch.equal(layer_norm_reference(x, weight, bias, EPS), wide.bfloat16())


@needs_native
@pytest.mark.parametrize("dim", [33, 64, 1000])
@pytest.mark.parametrize(("mean", "allowed"), [(1e3, 4e-4), (1e5, 4e-2)])
def test_native_is_exact_where_the_mean_is_large_against_the_deviation(mean: float, allowed: float, dim: int) -> None:
    # The mean of squares minus the square of the mean would be off by eps * mean^2: 0.06 of the variance here, or all of it.
    x = (mean + torch.randn(50, dim, generator=torch.Generator().manual_seed(3))).float()
    ones = torch.ones(dim)
    exact = layer_norm_reference(x.double(), ones.double(), None, EPS)
    _, mean_of_row, rstd = torch.ops.dist_llm.layer_norm(x, ones, None, EPS)
    expected_rstd = (x.double().var(-1, correction=0) + EPS).rsqrt()
    assert (rstd / expected_rstd - 1).abs().max() < 1e-6
    assert (mean_of_row - x.double().mean(-1)).abs().max() <= torch.finfo(torch.float32).eps * mean
    assert (layer_norm_native(x, ones, None, EPS) - exact).abs().max() < allowed


@needs_native
@pytest.mark.parametrize("dim", [20, 513, 4096])
@pytest.mark.parametrize("outlier", [1e2, 1e4, -1e6])
def test_native_variance_is_exact_wherever_an_outlier_is(outlier: float, dim: int) -> None:
    # The kernel measures deviations from the mean of the first numbers: an outlier among them is the worst it can meet.
    x = torch.randn(2, dim, generator=torch.Generator().manual_seed(3)) + 7
    x[0, 3] = x[1, -1] = outlier
    _, mean, rstd = torch.ops.dist_llm.layer_norm(x, torch.ones(dim), None, EPS)
    expected = (x.double().var(-1, correction=0) + EPS).rsqrt()
    assert (rstd / expected - 1).abs().max() < 5e-6
    assert (mean / x.double().mean(-1) - 1).abs().max() < 1e-5


@needs_native
def test_native_takes_the_expanded_gradient_of_a_sum() -> None:
    x, _, weight, bias, _ = make_inputs((4, 12), torch.float32)
    results = []
    for fn in (layer_norm_native, layer_norm_reference):
        leaf = x.clone().requires_grad_()
        fn(leaf, weight, bias, EPS).sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("used", [0, 1], ids=["only the norm", "only the sum"])
def test_native_residual_gradient_is_right_when_one_result_is_unused(used: int) -> None:
    x, residual, weight, bias, dy = make_inputs((4, 12), torch.float32)
    results = []
    for fn in (layer_norm_residual_native, layer_norm_residual_reference):
        leaf = residual.clone().requires_grad_()
        fn(x, leaf, weight, bias, EPS)[used].backward(dy)
        results.append(leaf.grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("used", [0, 1], ids=["only the norm", "only the sum"])
def test_native_makes_no_zeros_for_a_result_that_is_unused(used: int) -> None:
    x, residual, weight, bias, dy = make_inputs((4, 12), torch.float32)
    result = layer_norm_residual_native(x.requires_grad_(), residual, weight, bias, EPS)[used]
    with Recorder() as seen:
        result.backward(dy)
    assert seen.ops and seen.zeros == []


@needs_native
def test_native_sum_is_bit_equal_to_the_addition_of_torch() -> None:
    # A sum of two bf16 numbers is often a tie; torch rounds it to even.
    x, residual, weight, bias, _ = make_inputs((64, 100), torch.bfloat16)
    assert torch.equal(layer_norm_residual_native(x, residual, weight, bias, EPS)[1], x + residual)


@needs_native
@pytest.mark.parametrize("shape", [(2051, 1024), (4099, 513)], ids=str)
def test_native_is_right_where_results_are_stored_past_the_caches(shape: tuple[int, ...]) -> None:
    # 4 MiB and more; the last shape's rows are not whole cache lines, so it must not.
    x, residual, weight, bias, dy = make_inputs(shape, torch.bfloat16)
    results = []
    for fn in (layer_norm_residual_native, layer_norm_residual_reference):
        leaf = x.clone().requires_grad_()
        y, _ = fn(leaf, residual, weight, bias, EPS)
        y.backward(dy)
        results.append([y.detach().float(), leaf.grad.float()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-8)


@needs_native
def test_native_keeps_a_nan_visible() -> None:
    x, _, weight, bias, _ = make_inputs((3, 40), torch.bfloat16)
    x[1, 39] = float("nan")
    y = layer_norm_native(x, weight, bias, EPS)
    assert y[1].isnan().all()
    assert torch.isfinite(y[[0, 2]]).all()


Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x.double(), w, b), "takes x in fp32 or bf16"),
        (lambda x, w, b: (x, w[:-1], b), r"weight \(7\) must have the last dimension of x \(4, 8\)"),
        (lambda x, w, b: (x[:, :0], w[:0], b[:0]), "last dimension of at least 1"),
        (lambda x, w, b: (x, w, b[:-1]), r"bias \(7\) must have the shape of weight \(8\)"),
        (lambda x, w, b: (x.bfloat16(), w, b.bfloat16()), "bias is BFloat16 but weight is Float"),
    ],
)
def test_native_refuses_what_it_cannot_do(change: Callable[..., Arguments], message: str) -> None:
    x, _, weight, bias, _ = make_inputs((4, 8), torch.float32)
    with pytest.raises(RuntimeError, match=message):
        layer_norm_native(*change(x, weight, bias), EPS)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.bfloat16(), "residual is BFloat16 but x is Float"),
        (lambda r: r[:3], r"residual \(3, 8\) must have the shape of x \(4, 8\)"),
    ],
)
def test_native_refuses_a_residual_of_another_dtype_or_shape(change: Callable[[torch.Tensor], Any], message: str) -> None:
    x, residual, weight, bias, _ = make_inputs((4, 8), torch.float32)
    with pytest.raises(RuntimeError, match=message):
        layer_norm_residual_native(x, change(residual), weight, bias, EPS)


def test_why_not_native_names_the_dtypes_it_takes() -> None:
    assert "float64" in str(why_not_native(CPU, torch.float64))
    assert "torch.bfloat16" in str(why_not_native(CPU, torch.float64))
