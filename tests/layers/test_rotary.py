from __future__ import annotations

import pytest
import torch

from dist_llm.kernels.rotary.reference import rotary_reference
from dist_llm.layers.rotary import rotary_table


def turned_by_complex_numbers(x_BTNH: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Elements i and i + H/2 as one complex number, times e^(i position theta^(-2i/H)), in float64."""
    half = x_BTNH.shape[-1] // 2
    pairs = torch.complex(x_BTNH[..., :half].double(), x_BTNH[..., half:].double())
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, :, None, None] * frequencies
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("head_dim", "theta"), [(2, 10_000.0), (6, 10_000.0), (64, 500_000.0), (128, 10_000.0)])
def test_rotary_is_a_complex_multiplication(head_dim: int, theta: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, head_dim, generator=generator).to(dtype)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 1_000_003, 131_071, 2]])
    exact = turned_by_complex_numbers(x, positions, theta)
    ours = rotary_reference(x, *rotary_table(positions, head_dim, theta))
    assert ours.dtype == dtype
    # Two products, a sum and a table in fp32, then one rounding: far positions are no worse than near ones.
    pair_length = exact.abs().max()
    assert float((ours.double() - exact).abs().max() / pair_length) <= 2 * torch.finfo(dtype).eps


def test_position_zero_turns_nothing() -> None:
    x = torch.randn(1, 1, 2, 8)
    assert torch.equal(rotary_reference(x, *rotary_table(torch.zeros(1, 1, dtype=torch.int64), 8, 10_000.0)), x)


def test_rotary_keeps_lengths() -> None:
    x = torch.randn(2, 9, 3, 16)
    turned = rotary_reference(x, *rotary_table(torch.arange(9).expand(2, 9), 16, 10_000.0))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_a_score_depends_on_the_distance_of_positions_only() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 32, generator=generator)

    def score(query_position: int, key_position: int) -> float:
        places = torch.tensor([[query_position]]), torch.tensor([[key_position]])
        turned = [rotary_reference(x, *rotary_table(place, 32, 10_000.0)) for x, place in zip((q, k), places, strict=True)]
        return float((turned[0].double() * turned[1].double()).sum())

    for distance in (0, 1, 5, 300):
        near = score(distance, 0)
        for shift in (1, 77, 4096, 1_000_000):
            assert score(distance + shift, shift) == pytest.approx(near, abs=2e-5)
    assert abs(score(1, 0) - score(0, 1)) > 1e-2  # the sign of the distance matters


def test_gradient_is_turned_back() -> None:
    x = torch.randn(1, 4, 2, 8, requires_grad=True)
    cos, sin = rotary_table(torch.arange(4)[None], 8, 10_000.0)
    out = rotary_reference(x, cos, sin)
    dout = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, dout)
    torch.testing.assert_close(dx, rotary_reference(dout, cos, -sin))
