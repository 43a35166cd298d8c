"""What only gelu and swiglu have; test_every_op.py holds them to the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dist_llm.kernels.activation.native import NOTHING_DROPPED, gelu_native, swiglu_native, why_not_native
from dist_llm.kernels.activation.reference import gelu_reference, swiglu_reference
from dist_llm.kernels.dropout.reference import dropout_reference

CPU = torch.device("cpu")
FNS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "gelu": (gelu_reference, gelu_native),
    "swiglu": (swiglu_reference, swiglu_native),
}
PLACE: dict[str, Any] = {"seed": 5, "site": 77, "samples": torch.tensor([2**40, 3]), "columns": torch.tensor([4, 0, 9]), "feature_start": 8}

needs_native = pytest.mark.skipif(why_not_native(CPU, torch.float32) is not None, reason=str(why_not_native(CPU, torch.float32)))


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_() for shape in shapes]


def arguments(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, or gate and up, (2, 3, 24) and the biases."""
    count = 1 if name == "gelu" else 2
    return tensors(*[(2, 3, 24)] * count, *[(24,)] * count, dtype=dtype)


def test_references_equal_torch_in_float64() -> None:
    x, up, a, b = tensors((5, 33), (5, 33), (33,), (33,))
    torch.testing.assert_close(gelu_reference(x), F.gelu(x, approximate="tanh"), rtol=1e-14, atol=0)
    torch.testing.assert_close(gelu_reference(x, a), F.gelu(x + a, approximate="tanh"), rtol=1e-14, atol=0)
    torch.testing.assert_close(swiglu_reference(x, up), F.silu(x) * up, rtol=1e-14, atol=0)
    torch.testing.assert_close(swiglu_reference(x, up, a, b), F.silu(x + a) * (up + b), rtol=1e-14, atol=0)


def test_reference_gradients_are_those_of_finite_differences() -> None:
    x, up, a, b = tensors((2, 3, 5), (2, 3, 5), (5,), (5,))
    assert torch.autograd.gradcheck(lambda *t: gelu_reference(*t, p=0.4, **PLACE), (x, a))
    assert torch.autograd.gradcheck(lambda *t: swiglu_reference(*t, p=0.4, **PLACE), (x, up, a, b))


def test_references_compute_bf16_in_fp32_and_round_once() -> None:
    x, up, a, b = tensors((2, 3, 40), (2, 3, 40), (40,), (40,), dtype=torch.bfloat16)
    wide = [t.float() for t in (x, up, a, b)]
    assert torch.equal(gelu_reference(x, a), gelu_reference(wide[0], wide[2]).bfloat16())
    assert torch.equal(swiglu_reference(x, up, a, b, p=0.3, **PLACE), swiglu_reference(*wide, p=0.3, **PLACE).bfloat16())


def test_dropout_in_the_activation_is_dropout_of_its_result() -> None:
    x, up, a, b = tensors((2, 3, 24), (2, 3, 24), (24,), (24,))
    assert torch.equal(gelu_reference(x, a, p=0.4, **PLACE), dropout_reference(gelu_reference(x, a), 0.4, **PLACE))
    assert torch.equal(swiglu_reference(x, up, a, b, p=0.4, **PLACE), dropout_reference(swiglu_reference(x, up, a, b), 0.4, **PLACE))


@needs_native
@pytest.mark.parametrize("feature_start", [0, 3, 8, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FNS)
def test_native_drops_the_same_elements_forward_and_backward(name: str, dtype: torch.dtype, feature_start: int) -> None:
    reference, native = FNS[name]
    zeros = []
    for fn in (reference, native):
        args = [(t.detach().abs() + 0.1).requires_grad_() for t in arguments(name, dtype)]  # no result is 0 of itself
        y = fn(*args, p=0.4, **{**PLACE, "feature_start": feature_start})
        zeros.append([(t == 0) for t in (y, *torch.autograd.grad(y.sum(), args[: len(args) // 2]))])
    for theirs, ours in zip(*zeros, strict=True):
        assert torch.equal(theirs, ours)
    assert 0.2 < zeros[0][0].double().mean() < 0.6


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_is_finite_and_flat_far_from_zero(dtype: torch.dtype) -> None:
    sizes = torch.tensor([5.0, 10.0, 11.0, 20.0, 87.0, 88.0, 89.0, 104.0, 1e3, 1e4, 1e10, 1e30, 3e38]).to(dtype)
    x = torch.cat([sizes, -sizes]).requires_grad_()
    for fn in (gelu_native, lambda v: swiglu_native(v, torch.ones_like(v))):
        y = fn(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        right, left = slice(2, len(sizes)), slice(len(sizes) + 4, None)  # from 11 on, from -87 on
        torch.testing.assert_close(y[right], x[right].detach(), rtol=5e-4 if dtype == torch.float32 else 8e-3, atol=0, check_dtype=False)
        torch.testing.assert_close(dx[right], torch.ones_like(dx[right]), rtol=0, atol=1e-3 if dtype == torch.float32 else 8e-3)
        assert y[left].abs().max() <= 1e-34 and dx[left].abs().max() <= 1e-34
        assert torch.isfinite(y).all() and torch.isfinite(dx).all()


@needs_native
@pytest.mark.parametrize("name", FNS)
def test_native_keeps_a_nan_visible(name: str) -> None:
    native = FNS[name][1]
    for dtype in (torch.float32, torch.bfloat16):
        args = [t.detach() for t in arguments(name, dtype)]
        args[0][1, 2, 5] = float("nan")
        args[0].requires_grad_()
        y = native(*args)
        (dx,) = torch.autograd.grad(y.sum(), args[0])
        for result in (y, dx):
            assert result.isnan().sum() == 1 and result[1, 2, 5].isnan()


@needs_native
@pytest.mark.parametrize("name", FNS)
def test_native_takes_the_expanded_gradient_of_a_sum(name: str) -> None:
    grads = []
    for fn in FNS[name]:
        args = arguments(name, torch.float32)
        grads.append(torch.autograd.grad(fn(*args).sum(), args))
    for theirs, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_native
def test_native_saves_its_inputs_and_not_its_result() -> None:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x, bias = tensors((2, 3, 24), (24,), dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gelu_native(x, bias, p=0.5, **PLACE)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (x, bias, PLACE["samples"], PLACE["columns"])]


@pytest.mark.parametrize("fn", [gelu_reference, gelu_native])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.ones(5)}, r"bias \(5,\) must have the last dimension of x \(2, 3, 24\)"),
        ({"p": 1.0}, r"dropout probability must be in \[0, 1\), it is 1.0"),
        ({"p": 0.5, "samples": None}, "dropout with p = 0.5 needs samples and columns"),
        ({"p": 0.5, "columns": torch.arange(4)}, r"they are \(2, 3, 24\), \(2,\) and \(4,\)"),
    ],
)
def test_wrong_arguments_are_refused_with_their_values(fn: Callable[..., torch.Tensor], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fn(torch.ones(2, 3, 24), **{**PLACE, **change})


@pytest.mark.parametrize("fn", [swiglu_reference, swiglu_native])
def test_one_bias_of_swiglu_alone_is_refused(fn: Callable[..., torch.Tensor]) -> None:
    x, bias = torch.ones(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match="both biases or none, not gate_bias alone"):
        fn(x, x, bias)
    with pytest.raises(ValueError, match="both biases or none, not up_bias alone"):
        fn(x, x, None, bias)


@pytest.mark.parametrize("fn", [swiglu_reference, swiglu_native])
def test_an_up_of_another_shape_than_gate_is_refused(fn: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"up \(1, 8\) must have the shape of gate \(3, 8\)"):
        fn(torch.ones(3, 8), torch.ones(1, 8))


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, up, a, b: (x.double(), up.double(), None, None), "activation on CPU takes fp32 or bf16, not Double"),
        (lambda x, up, a, b: (x, up.bfloat16(), None, None), "up is BFloat16 but gate is Float"),
        (lambda x, up, a, b: (x, up[:1], None, None), r"up \(1, 3, 24\) must have the shape of gate \(2, 3, 24\)"),
        (lambda x, up, a, b: (x.bfloat16(), up.bfloat16(), a, b.bfloat16()), "up_bias is BFloat16 but gate_bias is Float"),
        (lambda x, up, a, b: (x, up, a[1:], b[1:]), r"gate_bias \(23\) must have the last dimension of gate \(2, 3, 24\)"),
        (
            lambda x, up, a, b: (x, up, a.bfloat16(), b.bfloat16()),
            "gate_bias is BFloat16; it must have the dtype of gate, Float, or be fp32",
        ),
        (lambda x, up, a, b: (x[..., :0], up[..., :0], None, None), "last dimension of at least 1"),
        (lambda x, up, a, b: (x.transpose(0, 1), up.transpose(0, 1), None, None), "must be contiguous"),
    ],
)
def test_the_op_refuses_what_it_cannot_do(change: Callable[..., tuple[Any, ...]], message: str) -> None:
    args = [t.detach() for t in arguments("swiglu", torch.float32)]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dist_llm.swiglu(*change(*args), *NOTHING_DROPPED)


def test_why_not_native_names_the_dtypes_it_takes() -> None:
    assert "not torch.float64" in str(why_not_native(CPU, torch.float64))
    assert "torch.bfloat16" in str(why_not_native(CPU, torch.float64))
