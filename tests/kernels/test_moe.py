"""The experts' MLPs, and all ops of a mixture of experts together: against dense MLPs and plain sums over each token's experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dist_llm.kernels.moe import MLP_IMPLS
from dist_llm.kernels.moe.grouped_linear import grouped_linear
from dist_llm.kernels.moe.mlp import expert_mlp_native, why_not_native_mlp
from dist_llm.kernels.moe.native import (
    moe_permute_native,
    moe_route_native,
    moe_unpermute_native,
    why_not_native,
    why_not_native_route,
)
from dist_llm.kernels.moe.reference import (
    expert_mlp_reference,
    moe_permute_reference,
    moe_route_reference,
    moe_unpermute_reference,
)
from tests.kernels.case import assert_close_to_float64, results
from tests.kernels.cases.moe import MLP_SIZES, Ragged, make_mlp

CPU = torch.device("cpu")
MLPS = [impl for impl in MLP_IMPLS if impl.why_not(CPU, torch.float32) is None]
WHY_NOT = next(filter(None, (why(CPU, torch.float32) for why in (why_not_native, why_not_native_route, why_not_native_mlp))), None)

needs_native = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
each_mlp = pytest.mark.parametrize("mlp", [i.fn for i in MLPS], ids=[i.name for i in MLPS])

Fn = Callable[..., Any]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@each_mlp
@pytest.mark.parametrize("gated", [True, False])
def test_each_expert_is_the_dense_mlp_of_its_rows(mlp: Fn, gated: bool) -> None:
    rows, counts, gate, up, down = make_mlp(Ragged((4, 0, 9, 1), 2, 12, 20, gated), torch.float32).args
    out = mlp(rows, counts, gate, up, down)
    begin = 0
    for e, size in enumerate(counts.tolist()):
        x = rows[begin : begin + size]
        inner = F.linear(x, up[e])
        inner = F.gelu(inner, approximate="tanh") if gate is None else F.silu(F.linear(x, gate[e])) * inner
        torch.testing.assert_close(out[begin : begin + size], F.linear(inner, down[e]), rtol=1e-5, atol=1e-5)
        begin += size
    assert out[begin:].eq(0).all()


@pytest.mark.parametrize("gated", [True, False])
def test_reference_mlp_gradients_are_those_of_finite_differences(gated: bool) -> None:
    sample = make_mlp(Ragged((2, 0, 1), 1, 3, 2, gated), torch.float32).double()
    tensors = [sample.args[where].requires_grad_() for where in sample.wanted]

    def mlp(*wanted: torch.Tensor) -> torch.Tensor:
        rows, *gate, up, down = wanted
        return expert_mlp_reference(rows, sample.args[1], gate[0] if gate else None, up, down)

    assert torch.autograd.gradcheck(mlp, tuple(tensors))


@each_mlp
@pytest.mark.parametrize("size", MLP_SIZES)
def test_mlp_in_fp32_is_as_exact_as_its_reference(mlp: Fn, size: str) -> None:
    sample = make_mlp(MLP_SIZES[size], torch.float32)
    exact, expected = results(expert_mlp_reference, sample.double()), results(expert_mlp_reference, sample)
    assert_close_to_float64(results(mlp, sample), expected, exact, sample, size)


@each_mlp
def test_fp32_masters_give_the_numbers_of_their_bf16_casts_and_get_fp32_gradients(mlp: Fn) -> None:
    rows, counts, *weights = make_mlp(Ragged((5, 0, 3), 0, 16, 24), torch.bfloat16).args
    masters = [w.float().requires_grad_() for w in weights]
    casts = [w.clone().requires_grad_() for w in weights]
    outputs = [mlp(rows, counts, *w) for w in (masters, casts)]
    assert torch.equal(outputs[0], outputs[1])
    for output in outputs:
        output.backward(torch.ones_like(output))
    for master, cast in zip(masters, casts, strict=True):
        assert master.grad is not None and cast.grad is not None and master.grad.dtype == torch.float32
        assert torch.equal(master.grad, cast.grad.float())
        assert master.grad[1].eq(0).all() and master.grad[0].ne(0).any()


@each_mlp
def test_mlp_refuses_what_it_cannot_do(mlp: Fn) -> None:
    rows, counts, gate, up, down = make_mlp(Ragged((2, 1), 0, 6, 4), torch.float32).args
    with pytest.raises(ValueError, match=r"counts \[3, 1\] must not be negative, nor add up to more than the number of rows \(3\)"):
        mlp(rows, counts + ints(1, 0), gate, up, down)
    with pytest.raises(ValueError, match=r"counts \[-1, 1\] must not be negative"):
        mlp(rows, counts - ints(3, 0), gate, up, down)
    with pytest.raises(ValueError, match=r"counts \(3,\) must have one number for each of the 2 experts"):
        mlp(rows, ints(1, 1, 1), gate, up, down)
    with pytest.raises(ValueError, match=r"down \(2, 4, 6\) must be \(experts, H, F\), here \(2, 6, 4\)"):
        mlp(rows, counts, gate, up, down.transpose(1, 2))
    with pytest.raises(ValueError, match=r"gate \(1, 4, 6\) must have the shape of up \(2, 4, 6\)"):
        mlp(rows, counts, gate[:1], up, down)
    with pytest.raises(ValueError, match=r"up \(2, 4, 5\)"):
        mlp(rows, counts, gate, up[:, :, :5], down)


def test_grouped_linear_computes_only_the_gradients_that_are_wanted() -> None:
    rows, counts, _, up, _ = make_mlp(Ragged((2, 1), 0, 6, 4), torch.float32).args
    frozen = up.clone()
    leaf = rows.clone().requires_grad_()
    grouped_linear(leaf, counts, frozen).sum().backward()
    assert leaf.grad is not None and frozen.grad is None
    torch.testing.assert_close(leaf.grad, up.sum(1)[[0, 0, 1]])
    trained = up.clone().requires_grad_()
    grouped_linear(rows, counts, trained).sum().backward()
    assert trained.grad is not None
    torch.testing.assert_close(trained.grad[1], rows[2].expand(4, 6))


@each_mlp
def test_without_experts_all_rows_are_zeros(mlp: Fn) -> None:
    rows = randn(3, 6).requires_grad_()
    out = mlp(rows, ints(), None, torch.zeros(0, 4, 6), torch.zeros(0, 6, 4))
    assert torch.equal(out, torch.zeros(3, 6))


def test_grouped_linear_without_groups_is_zeros_with_a_gradient_of_zeros() -> None:
    rows = randn(3, 6).requires_grad_()
    out = grouped_linear(rows, ints(), torch.zeros(0, 4, 6))
    assert torch.equal(out, torch.zeros(3, 4))
    assert torch.equal(torch.autograd.grad(out.sum(), rows)[0], torch.zeros(3, 6))


def layer(x: torch.Tensor, logits: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *fns: Fn) -> torch.Tensor:
    """A layer of experts, from the four functions."""
    route, permute, mlp, unpermute = fns
    weights, experts, _, _ = route(logits, 3, scores="sigmoid", groups=2, groups_kept=1, scale=1.5)
    rows, source, counts, _ = permute(x, experts, logits.shape[1])
    out: torch.Tensor = unpermute(mlp(rows, counts, gate, up, down), source, weights, top_k=3)
    return out


def layer_by_token(x: torch.Tensor, logits: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The same as a sum for each token over its experts, nothing sorted."""
    weights, experts, _, _ = moe_route_reference(logits, 3, scores="sigmoid", groups=2, groups_kept=1, scale=1.5)
    outputs = []
    for t, chosen in enumerate(experts.tolist()):
        terms = [w * (down[e] @ (F.silu(gate[e] @ x[t]) * (up[e] @ x[t]))) for w, e in zip(weights[t], chosen, strict=True)]
        outputs.append(torch.stack(terms).sum(0))
    return torch.stack(outputs)


def layer_arguments() -> list[torch.Tensor]:
    shapes = [(17, 6), (17, 8), (8, 10, 6), (8, 10, 6), (8, 6, 10)]
    return [randn(*shape, seed=seed, dtype=torch.float64) for seed, shape in enumerate(shapes)]


REFERENCES = (moe_route_reference, moe_permute_reference, expert_mlp_reference, moe_unpermute_reference)


def test_route_permute_mlp_unpermute_are_the_sum_over_each_tokens_experts_in_float64() -> None:
    ours, plain = ([t.clone().requires_grad_() for t in layer_arguments()] for _ in range(2))
    out, expected = layer(*ours, *REFERENCES), layer_by_token(*plain)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    arriving = randn(*out.shape, seed=9, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(out, ours, arriving), torch.autograd.grad(expected, plain, arriving), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@needs_native
def test_the_native_ops_together_are_the_reference_ops_together() -> None:
    native, reference = ([t.float().requires_grad_() for t in layer_arguments()] for _ in range(2))
    fns = (moe_route_native, moe_permute_native, expert_mlp_native, moe_unpermute_native)
    out, expected = layer(*native, *fns), layer(*reference, *REFERENCES)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    arriving = randn(*out.shape, seed=9)
    for a, b in zip(torch.autograd.grad(out, native, arriving), torch.autograd.grad(expected, reference, arriving), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@needs_native
def test_the_native_ops_together_compile_as_one_graph() -> None:
    fns = (moe_route_native, moe_permute_native, expert_mlp_native, moe_unpermute_native)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: layer(*a, *fns), fullgraph=True, backend="aot_eager")
    plain, traced = ([t.float().requires_grad_() for t in layer_arguments()] for _ in range(2))
    out, same = layer(*plain, *fns), compiled(*traced)
    assert torch.equal(out, same)
    for a, b in zip(torch.autograd.grad(out.sum(), plain), torch.autograd.grad(same.sum(), traced), strict=True):
        assert torch.equal(a, b)


def test_why_not_native_names_the_dtypes_it_takes() -> None:
    assert "torch.bfloat16, not torch.float64" in str(why_not_native_mlp(CPU, torch.float64))
