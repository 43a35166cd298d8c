from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_llm.kernels.adamw import IMPLS, SUM_OF_SQUARES_IMPLS
from dist_llm.kernels.adamw import reference as definition
from dist_llm.kernels.adamw.native import adamw_step_native, global_sum_of_squares_native, why_not_native
from dist_llm.kernels.adamw.reference import adamw_step_reference, adamw_step_torch, global_sum_of_squares_reference
from dist_llm.kernels.impl import Impl

CPU = torch.device("cpu")
NUMBERS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((7, 33), (5,))

RUNNABLE = [impl for impl in IMPLS if impl.why_not(CPU, torch.float32) is None]
needs_native = pytest.mark.skipif(why_not_native(CPU, torch.float32) is not None, reason=str(why_not_native(CPU, torch.float32)))


def zeros(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in SHAPES]


def draws(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def steps_of(fn: Callable[..., None], dtype: torch.dtype, count: int, **options: Any) -> list[list[torch.Tensor]]:
    """Parameters and moments after some steps."""
    params, exp_avgs, exp_avg_sqs = draws(0, dtype), zeros(dtype), zeros(dtype)
    for step in range(1, count + 1):
        fn(params, draws(step, dtype), exp_avgs, exp_avg_sqs, step=step, **NUMBERS, **options)
    return [params, exp_avgs, exp_avg_sqs]


def test_reference_equals_torch_in_float64() -> None:
    params = [torch.nn.Parameter(p) for p in draws(0, torch.float64)]
    optimizer = torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for step in range(1, 6):
        for param, grad in zip(params, draws(step, torch.float64), strict=True):
            param.grad = grad
        optimizer.step()
    for ours, theirs in zip(steps_of(adamw_step_reference, torch.float64, 5)[0], params, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("impl", RUNNABLE, ids=lambda impl: impl.name)
def test_a_long_run_stays_near_float64(impl: Impl) -> None:
    exact = steps_of(adamw_step_reference, torch.float64, 50)
    for ours, truth in zip(steps_of(impl.fn, torch.float32, 50), exact, strict=True):
        for tensor, true in zip(ours, truth, strict=True):
            # 1 - lr weight_decay is rounded to fp32, which shrinks a parameter of 3 by 4.5e-6 too much or too little in fifty steps.
            torch.testing.assert_close(tensor.double(), true, rtol=0, atol=5e-6)


@needs_native
def test_native_differs_from_torchs_fused_kernel_by_roundings_only() -> None:
    ours, theirs = steps_of(adamw_step_native, torch.float32, 1), steps_of(adamw_step_torch, torch.float32, 1)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert ((a - b).abs() <= torch.finfo(torch.float32).eps * b.abs()).all()


@needs_native
def test_native_moments_are_torchs_but_for_roundings_after_several_steps() -> None:
    grads, moments = [torch.linspace(-1, 1, 67)], {}
    for name, fn in (("native", adamw_step_native), ("torch", adamw_step_torch)):
        moments[name] = [torch.zeros(67)], [torch.zeros(67)]
        for step in (1, 2, 3):
            fn([torch.ones(67)], grads, *moments[name], step=step, **NUMBERS)
    # Bit for bit where the processor multiplies and adds at once, as torch's vectors do; the generic code rounds products as well.
    for ours, theirs in zip(moments["native"], moments["torch"], strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=4e-7, atol=0)


@pytest.mark.parametrize("impl", RUNNABLE, ids=lambda impl: impl.name)
def test_scaled_gradients_are_gradients_multiplied_beforehand(impl: Impl) -> None:
    scaled = steps_of(impl.fn, torch.float32, 3, grad_scale=torch.tensor(0.25))
    by_number = steps_of(impl.fn, torch.float32, 3, grad_scale=0.25)
    params, exp_avgs, exp_avg_sqs = draws(0), zeros(), zeros()
    for step in (1, 2, 3):
        grads = [0.25 * g for g in draws(step)]  # a power of two: exact
        kept = [g.clone() for g in grads]
        impl.fn(params, grads, exp_avgs, exp_avg_sqs, step=step, **NUMBERS)
        assert all(torch.equal(g, k) for g, k in zip(grads, kept, strict=True)), "gradients are not changed"
    for results in (scaled, by_number):
        for ours, plain in zip(results, (params, exp_avgs, exp_avg_sqs), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("impl", RUNNABLE, ids=lambda impl: impl.name)
def test_copies_are_the_new_parameters_rounded(impl: Impl) -> None:
    params, copies = draws(0), zeros(torch.bfloat16)
    impl.fn(params, draws(1, torch.bfloat16), zeros(), zeros(), step=1, copies=copies, **NUMBERS)
    assert all(torch.equal(copy, param.bfloat16()) for copy, param in zip(copies, params, strict=True))


@pytest.mark.parametrize("impl", RUNNABLE, ids=lambda impl: impl.name)
def test_parameters_of_any_strides_are_updated_where_they_lie(impl: Impl) -> None:
    plain = [torch.arange(12.0).view(3, 4)]
    scattered = [torch.arange(12.0).view(3, 4).t().contiguous().t()]
    grad, moments = torch.arange(12.0).view(3, 4), []
    for params in (plain, scattered):
        moments.append([torch.arange(12.0).view(3, 4) + 1, (torch.arange(12.0).view(3, 4) + 2).t().contiguous().t()])
        impl.fn(params, [grad], moments[-1][:1], moments[-1][1:], step=1, **NUMBERS)
    assert torch.equal(plain[0], scattered[0])
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    expected = [torch.arange(12.0).view(3, 4)]
    adamw_step_reference(expected, [grad], [torch.arange(12.0).view(3, 4) + 1], [torch.arange(12.0).view(3, 4) + 2], step=1, **NUMBERS)
    torch.testing.assert_close(plain[0], expected[0], rtol=1e-6, atol=1e-6)


def test_torchs_fused_kernel_gets_gradients_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = steps_of(adamw_step_torch, torch.float32, 2, grad_scale=0.5)
    monkeypatch.setattr(definition, "PART_ELEMENTS", 4)
    calls = []
    kernel = definition.adamw
    monkeypatch.setattr(definition, "adamw", lambda params, *a, **k: (calls.append(len(params)), kernel(params, *a, **k)))
    in_parts = steps_of(adamw_step_torch, torch.float32, 2, grad_scale=0.5)
    assert calls == [1, 1, 1, 1]
    assert all(torch.equal(a, b) for one, two in zip(whole, in_parts, strict=True) for a, b in zip(one, two, strict=True))


@needs_native
def test_a_graph_that_saved_an_old_parameter_notices_the_update() -> None:
    param = torch.ones(4, requires_grad=True)
    loss = (param * param).sum()
    adamw_step_native([param], [torch.ones(4)], [torch.zeros(4)], [torch.zeros(4)], step=1, **NUMBERS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_native
def test_a_nan_in_the_factor_reaches_every_parameter() -> None:
    params = steps_of(adamw_step_native, torch.float32, 1, grad_scale=torch.tensor(float("nan")))[0]
    assert all(p.isnan().all() for p in params)


SUMS = [impl for impl in SUM_OF_SQUARES_IMPLS if impl.why_not(CPU, torch.float32) is None]


@pytest.mark.parametrize("impl", SUMS, ids=lambda impl: impl.name)
def test_squares_that_fp32_cannot_hold_are_summed(impl: Impl) -> None:
    huge, tiny = torch.full((40,), 1e30), torch.full((40,), 1e-30)
    assert impl.fn([huge]).item() == pytest.approx(40e60, rel=1e-6)
    assert impl.fn([tiny]).item() == pytest.approx(40e-60, rel=1e-6)


@needs_native
def test_sum_of_squares_equals_the_norm_of_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(n, generator=generator) for n in (1, 31, 8192, 100_001)] + [torch.randn(50, generator=generator).bfloat16()]
    exact = global_sum_of_squares_reference(tensors).item()
    assert global_sum_of_squares_native(tensors).item() == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("impl", SUMS, ids=lambda impl: impl.name)
def test_the_sum_over_no_tensors_is_refused(impl: Impl) -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        impl.fn([])


@pytest.mark.parametrize("impl", RUNNABLE, ids=lambda impl: impl.name)
def test_lists_that_do_not_belong_together_are_refused(impl: Impl) -> None:
    with pytest.raises(ValueError, match="grads has 1 tensors for 2 params"):
        impl.fn(draws(0), draws(1)[:1], zeros(), zeros(), step=1, **NUMBERS)
    with pytest.raises(ValueError, match=r"exp_avgs\[1\] \(7, 33\) must have the shape of params\[1\] \(5,\)"):
        impl.fn(draws(0), draws(1), zeros()[:1] * 2, zeros(), step=1, **NUMBERS)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": draws(0, torch.float64)}, r"params\[0\] is Double; it must be Float"),
        ({"grads": [draws(1)[0], draws(1)[1].bfloat16()]}, r"grads\[1\] is BFloat16; it must be Float"),
        ({"grads": draws(1, torch.float64)}, "adamw_step on CPU takes fp32 or bf16, not Double"),
        ({"copies": zeros(torch.float16)}, "writes copies in bf16, not Half"),
        ({"step": 0}, r"step \(0\) must be at least 1"),
        ({"beta2": 1.0}, r"beta2 \(1\) must be in \[0, 1\)"),
        ({"grad_scale": torch.ones(2)}, r"grad_scale \(2\) in Float must be one fp32 number"),
    ],
)
def test_native_refuses_what_it_cannot_do(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"params": draws(0), "grads": draws(1), "exp_avgs": zeros(), "exp_avg_sqs": zeros(), "step": 1, **NUMBERS}
    with pytest.raises(RuntimeError, match=message):
        adamw_step_native(**{**arguments, **change})


def test_why_not_names_the_dtypes_and_the_device() -> None:
    assert "torch.bfloat16, not torch.float64" in str(why_not_native(CPU, torch.float64))
    assert "not on meta" in str(IMPLS[1].why_not(torch.device("meta"), torch.float32))
