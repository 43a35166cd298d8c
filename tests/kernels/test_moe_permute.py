"""Rows sorted by expert and brought back: what the definitions mean, by hand, and what only these ops refuse or promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_llm.kernels.moe import PERMUTE_IMPLS, UNPERMUTE_IMPLS
from dist_llm.kernels.moe.native import moe_permute_native, moe_unpermute_native, why_not_native
from dist_llm.kernels.moe.reference import moe_permute_reference, moe_unpermute_reference

CPU = torch.device("cpu")
PERMUTES = [impl for impl in PERMUTE_IMPLS if impl.why_not(CPU, torch.float32) is None]
UNPERMUTES = [impl for impl in UNPERMUTE_IMPLS if impl.why_not(CPU, torch.float32) is None]
NAN = float("nan")

needs_native = pytest.mark.skipif(len(PERMUTES) == 1, reason=str(why_not_native(CPU, torch.float32)))
each_permute = pytest.mark.parametrize("permute", [i.fn for i in PERMUTES], ids=[i.name for i in PERMUTES])
each_unpermute = pytest.mark.parametrize("unpermute", [i.fn for i in UNPERMUTES], ids=[i.name for i in UNPERMUTES])

Fn = Callable[..., Any]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@each_permute
def test_rows_are_sorted_by_expert_and_inside_an_expert_by_token(permute: Fn) -> None:
    x = torch.arange(4.0).unsqueeze(-1) * torch.ones(4, 3)
    experts = torch.tensor([[2, 0], [0, 2], [3, 0], [2, 3]], dtype=torch.int32)
    rows, source, counts, offsets = permute(x, experts, 5)
    assert rows[:, 0].tolist() == [0, 1, 2, 0, 1, 3, 2, 3]
    assert source.tolist() == [1, 2, 5, 0, 3, 6, 4, 7]
    assert counts.tolist() == [3, 0, 3, 2, 0] and offsets.tolist() == [0, 3, 3, 6, 8, 8]


@each_permute
def test_slots_of_no_expert_come_last_as_zeros(permute: Fn) -> None:
    rows, source, counts, offsets = permute(torch.ones(3, 2), torch.tensor([[-1, 1], [0, -1], [1, 0]], dtype=torch.int32), 2)
    assert source.tolist() == [2, 5, 1, 4, -1, -1]
    assert rows[:, 0].tolist() == [1, 1, 1, 1, 0, 0]
    assert counts.tolist() == [2, 2] and offsets.tolist() == [0, 2, 4]


@each_unpermute
def test_unpermute_takes_back_what_permute_did(unpermute: Fn) -> None:
    x, experts = randn(30, 7), torch.rand(30, 9, generator=torch.Generator().manual_seed(2)).argsort(-1)[:, :4].to(torch.int32)
    rows, source, _, _ = moe_permute_reference(x, experts, 9)
    torch.testing.assert_close(unpermute(rows, source, torch.full((30, 4), 0.25), top_k=4), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(unpermute(rows, source, None, top_k=4), 4 * x, rtol=1e-6, atol=1e-6)


@each_unpermute
def test_a_dropped_slot_adds_nothing_and_has_no_gradient(unpermute: Fn) -> None:
    rows = torch.tensor([[1.0], [10.0], [100.0], [NAN]], requires_grad=True)
    weights = torch.tensor([[0.5, 2.0], [3.0, 7.0]], requires_grad=True)
    out = unpermute(rows, ints(2, 0, 1, -1), weights, top_k=2)
    assert out.tolist() == [[205.0], [3.0]]
    drows, dweights = torch.autograd.grad(out.sum(), [rows, weights])
    assert drows.flatten().tolist() == [3.0, 0.5, 2.0, 0.0]
    assert dweights.tolist() == [[10.0, 100.0], [1.0, 0.0]]


def test_reference_permute_and_unpermute_gradients_are_those_of_finite_differences() -> None:
    experts = torch.tensor([[2, 0], [-1, 2], [1, 0]], dtype=torch.int32)
    x, weights = randn(3, 4, dtype=torch.float64).requires_grad_(), randn(3, 2, seed=1, dtype=torch.float64).requires_grad_()

    def there_and_back(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows, source, _, _ = moe_permute_reference(x, experts, 3)
        return moe_unpermute_reference(rows.square(), source, weights, top_k=2)

    assert torch.autograd.gradcheck(there_and_back, (x, weights))


def test_reference_unpermute_adds_bf16_rows_in_fp32_and_rounds_once() -> None:
    rows = torch.tensor([[1.0], [2.0**-8], [2.0**-8]]).bfloat16()
    assert moe_unpermute_reference(rows, ints(0, 1, 2), None, top_k=3).item() == 1 + 2.0**-7


@needs_native
def test_native_permute_and_unpermute_take_the_expanded_gradient_of_a_sum() -> None:
    x, experts, weights = randn(6, 5), ints(*[1, 0, 2] * 4).view(6, 2), torch.rand(6, 2)
    leaf = x.clone().requires_grad_()
    rows, source, _, _ = moe_permute_native(leaf, experts, 3)
    rows.sum().backward()
    assert leaf.grad is not None and leaf.grad.eq(2).all()
    leaf = rows.detach().clone().requires_grad_()
    moe_unpermute_native(leaf, source, weights, top_k=2).sum().backward()
    torch.testing.assert_close(leaf.grad, weights.flatten()[source.long()].unsqueeze(-1).expand(12, 5))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_too_large_for_the_caches_are_the_same(dtype: torch.dtype) -> None:
    # Large enough to be written past the caches, with rows that are whole cache lines but not whole steps of the loops.
    tokens, width, top_k = 4000, 544, 2
    experts = torch.randint(-1, 5, (tokens, top_k), generator=torch.Generator().manual_seed(4)).to(torch.int32)
    x, weights, arriving = randn(tokens, width).to(dtype), randn(tokens, top_k, seed=1), randn(tokens, width, seed=2).to(dtype)
    answers = []
    for permute, unpermute in ((moe_permute_native, moe_unpermute_native), (moe_permute_reference, moe_unpermute_reference)):
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        rows, source, _, _ = permute(leaves[0], experts, 5)
        out = unpermute(rows, source, leaves[1], top_k=top_k)
        unweighted = unpermute(rows, source, None, top_k=top_k)
        answers.append([rows, source, out, *torch.autograd.grad([out, unweighted], leaves, [arriving, arriving])])
    assert torch.equal(answers[0][0], answers[1][0]) and torch.equal(answers[0][1], answers[1][1])
    for ours, theirs in zip(answers[0][2:], answers[1][2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-4, atol=1e-2)


@each_permute
@pytest.mark.parametrize(
    ("experts", "message"),
    [([[0, 3]], "must be from -1 to num_experts - 1"), ([[-2, 0]], "must be from -1 to num_experts - 1"), ([[0, 1]] * 2, "experts")],
    ids=["too large", "too small", "another number of tokens"],
)
def test_permute_refuses_what_it_cannot_do(permute: Fn, experts: list[list[int]], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        permute(torch.zeros(1, 4), torch.tensor(experts, dtype=torch.int32), 3)


@each_unpermute
def test_unpermute_refuses_what_it_cannot_do(unpermute: Fn) -> None:
    rows = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"number of rows \(4\) must be divisible by top_k \(3\)"):
        unpermute(rows, ints(0, 1, 2, 3), None, top_k=3)
    with pytest.raises(ValueError, match=r"weights \(4, 1\) must be \(tokens, top_k\), here \(2, 2\)"):
        unpermute(rows, ints(0, 1, 2, 3), torch.ones(4, 1), top_k=2)
    with pytest.raises(ValueError, match=r"source \(3,\)"):
        unpermute(rows, ints(0, 1, 2), None, top_k=2)
    with pytest.raises((ValueError, RuntimeError), match="must be from -1 to 3"):
        unpermute(rows, ints(0, 1, 2, 4), None, top_k=2)


@needs_native
def test_native_refuses_other_dtypes_and_a_slot_that_occurs_twice() -> None:
    with pytest.raises(RuntimeError, match="source 1 of row 2 is that of row 0 too"):
        moe_unpermute_native(torch.zeros(4, 3), ints(1, 0, 1, 3), None, top_k=2)
    with pytest.raises(RuntimeError, match="moe_permute on CPU takes fp32 or bf16"):
        moe_permute_native(torch.zeros(2, 3).double(), ints(0, 1).view(2, 1), 2)
    with pytest.raises(RuntimeError, match="experts is Long; it must be Int"):
        moe_permute_native(torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), 2)


@needs_native
def test_zero_rest_leaves_the_rows_that_belong_to_groups() -> None:
    rows = torch.ones(5, 3)
    torch.ops.dist_llm.moe_zero_rest_(rows, ints(1, 0, 2))
    assert rows[:, 0].tolist() == [1, 1, 1, 0, 0]


def test_why_not_native_names_the_dtypes_it_takes() -> None:
    assert "torch.bfloat16, not torch.float64" in str(why_not_native(CPU, torch.float64))
