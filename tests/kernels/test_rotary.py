"""What only rotary has; test_every_op.py holds it to the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dist_llm.kernels.rotary.native import rotary_native, why_not_native
from dist_llm.kernels.rotary.reference import rotary_reference

CPU = torch.device("cpu")
FNS = [rotary_reference, rotary_native]

needs_native = pytest.mark.skipif(why_not_native(CPU, torch.float32) is not None, reason=str(why_not_native(CPU, torch.float32)))


def table(batch: int, tokens: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    angles = 6.3 * torch.rand(batch, tokens, 1, head_dim // 2, generator=generator, dtype=torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def test_reference_is_a_complex_multiplication_in_float64() -> None:
    x = torch.randn(2, 5, 3, 14, dtype=torch.float64)
    cos, sin = table(2, 5, 14, torch.float64)
    turned = torch.complex(x[..., :7], x[..., 7:]) * torch.complex(cos, sin)
    torch.testing.assert_close(rotary_reference(x, cos, sin), torch.cat([turned.real, turned.imag], -1), rtol=1e-14, atol=1e-15)


def test_reference_gradient_is_that_of_finite_differences() -> None:
    cos, sin = table(2, 3, 6, torch.float64)
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rotary_reference(t, cos, sin), (x,))


def test_reference_computes_bf16_in_fp32_and_rounds_once() -> None:
    x = torch.randn(2, 5, 3, 64).bfloat16()
    cos, sin = table(2, 5, 64)
    assert torch.equal(rotary_reference(x, cos, sin), rotary_reference(x.float(), cos, sin).bfloat16())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_reads_a_part_of_a_fused_projection_where_it_lies(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.randn(2, 5, 3 * 4 * 40).to(dtype)
    query, key, _ = (qkv[..., i : i + 160].view(2, 5, 4, 40) for i in (0, 160, 320))
    cos, sin = table(2, 5, 40)
    expected = [rotary_native(part.contiguous(), cos, sin) for part in (query, key, query.transpose(1, 2).transpose(1, 2))]

    def no_copy(self: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"a copy of {tuple(self.shape)} was made")

    monkeypatch.setattr(torch.Tensor, "contiguous", no_copy)
    for part, whole in zip((query, key, query), expected, strict=True):
        ours = rotary_native(part, cos, sin)
        assert torch.equal(ours, whole)
        assert ours.is_contiguous()


@needs_native
def test_native_takes_heads_before_tokens_and_gradients_of_any_strides() -> None:
    x = torch.randn(2, 3, 5, 16).transpose(1, 2)
    cos, sin = table(2, 5, 16)
    arriving = torch.randn(16, 3, 5, 2).permute(3, 2, 1, 0)
    results = []
    for fn in FNS:
        leaf = x.detach().requires_grad_()
        y = fn(leaf, cos, sin)
        results.append((y, *torch.autograd.grad(y, leaf, arriving)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [(1, 5), (2, 1), (1, 1)])
@pytest.mark.parametrize("fn", [rotary_reference, pytest.param(rotary_native, marks=needs_native)])
def test_one_row_of_a_table_holds_for_all(fn: Callable[..., torch.Tensor], shared: tuple[int, int]) -> None:
    x = torch.randn(2, 5, 3, 8)
    cos, sin = table(*shared, 8)
    whole = [t.expand(2, 5, 1, 4).contiguous() for t in (cos, sin)]
    assert torch.equal(fn(x, cos, sin), fn(x, *whole))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_angle_zero_turns_nothing_and_a_quarter_swaps_halves(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 3, 48).to(dtype)
    one, zero = torch.ones(1, 2, 1, 24), torch.zeros(1, 2, 1, 24)
    assert torch.equal(rotary_native(x, one, zero), x)
    assert torch.equal(rotary_native(x, zero, one), torch.cat([-x[..., 24:], x[..., :24]], -1))


@pytest.mark.parametrize("fn", FNS)
def test_wrong_shapes_are_refused_with_their_values(fn: Callable[..., torch.Tensor]) -> None:
    x = torch.randn(2, 5, 3, 8)
    cos, sin = table(2, 5, 8)
    with pytest.raises(ValueError, match=r"H even, it is \(2, 5, 3, 7\)"):
        fn(x[..., :7], cos, sin)
    with pytest.raises(ValueError, match=r"cos \(2, 4, 1, 4\) must be \(B, T, 1, H/2\) for x \(B, T, N, H\) \(2, 5, 3, 8\)"):
        fn(x, cos[:, :4], sin)
    with pytest.raises(ValueError, match=r"sin \(2, 5, 4\) must be"):
        fn(x, cos, sin[:, :, 0])


def test_native_refuses_a_table_that_wants_a_gradient() -> None:
    cos, sin = table(2, 5, 8)
    with pytest.raises(ValueError, match="no gradient of them"):
        rotary_native(torch.randn(2, 5, 3, 8), cos.requires_grad_(), sin)


@needs_native
def test_the_op_refuses_what_it_cannot_do() -> None:
    x = torch.randn(2, 5, 3, 8)
    cos, sin = table(2, 5, 8)
    op = torch.ops.dist_llm.rotary
    with pytest.raises(RuntimeError, match="rotary on CPU takes fp32 or bf16, not Double"):
        op(x.double(), cos, sin, False)
    with pytest.raises(RuntimeError, match="cos must be fp32, not Double"):
        op(x, cos.double(), sin, False)
    with pytest.raises(RuntimeError, match="last dimension of stride 1, not 15"):
        op(x.transpose(1, 3).contiguous().transpose(1, 3), cos, sin, False)


def test_why_not_native_names_the_dtypes_it_takes() -> None:
    assert "not torch.float64" in str(why_not_native(CPU, torch.float64))


@needs_native
def test_an_empty_batch_has_a_gradient() -> None:
    cos, sin = table(1, 5, 8)
    x = torch.randn(0, 5, 2, 8, requires_grad=True)
    rotary_native(x, cos, sin).sum().backward()  # what arrives is one number at stride 0
    assert x.grad is not None and x.grad.shape == x.shape
