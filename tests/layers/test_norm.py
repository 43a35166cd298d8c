from __future__ import annotations

import pytest
import torch

from dist_llm.kernels.rms_norm.reference import rms_norm_reference
from dist_llm.layers.norm import LayerNorm, RMSNorm

EPS = 1e-5


def exact_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, centred: bool) -> torch.Tensor:
    """The formula, in float64."""
    if centred:
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return y if bias is None else y + bias


def make(kind: str, dim: int) -> RMSNorm | LayerNorm:
    norm = (
        RMSNorm(dim, eps=EPS, fn=rms_norm_reference) if kind == "rms_norm" else LayerNorm(dim, eps=EPS, bias=kind == "layer_norm with bias")
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(1 + 0.3 * torch.randn(dim, generator=generator))
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm", "layer_norm with bias"])
def test_a_norm_is_its_formula_forward_and_backward(kind: str, dtype: torch.dtype) -> None:
    norm = make(kind, 123)
    generator = torch.Generator().manual_seed(0)
    # Far from zero on average, so that a mean that is subtracted, or is not, makes a difference.
    x = (3 * torch.randn(5, 7, 123, generator=generator) + 1.5).to(dtype).requires_grad_()
    dy = torch.randn(5, 7, 123, generator=generator).to(dtype)
    parameters = list(norm.parameters())
    y = norm(x)
    grads = torch.autograd.grad(y, [x, *parameters], dy)

    # In bf16 the gains are rounded before they are used, as they are in a module whose parameters are bf16.
    wide = [x.detach().double().requires_grad_()] + [p.detach().to(dtype).double().requires_grad_() for p in parameters]
    exact = exact_norm(wide[0], wide[1], wide[2] if len(wide) > 2 else None, centred=kind != "rms_norm")
    exact_grads = torch.autograd.grad(exact, wide, dy.double())

    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert float((y.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max()) <= 4 * eps
    assert [g.dtype for g in grads] == [dtype] + [torch.float32] * len(parameters)
    for ours, truth in zip(grads, exact_grads, strict=True):
        assert float((ours.double() - truth).abs().max() / truth.abs().max()) <= 8 * eps


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_a_norm_forgets_the_scale_of_its_input(kind: str) -> None:
    norm = make(kind, 64)
    x = torch.randn(3, 64)
    torch.testing.assert_close(norm(1000 * x), norm(x), rtol=2e-5, atol=2e-5)
    assert norm(torch.zeros(1, 64)).isfinite().all()


def test_layer_norm_forgets_a_shift_and_rms_norm_does_not() -> None:
    x = torch.randn(3, 64)
    torch.testing.assert_close(make("layer_norm", 64)(x + 5), make("layer_norm", 64)(x), rtol=1e-4, atol=1e-4)
    assert (make("rms_norm", 64)(x + 5) - make("rms_norm", 64)(x)).abs().max() > 0.1


def test_without_bias_layer_norm_has_one_parameter() -> None:
    assert [name for name, _ in make("layer_norm", 8).named_parameters()] == ["weight"]
    assert [name for name, _ in make("layer_norm with bias", 8).named_parameters()] == ["weight", "bias"]
