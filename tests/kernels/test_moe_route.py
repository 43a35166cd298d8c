"""The choice of experts: what the definition means, by hand and against torch, and what only this op refuses or promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_llm.kernels.moe import ROUTE_IMPLS
from dist_llm.kernels.moe.native import moe_route_native, why_not_native_route
from dist_llm.kernels.moe.reference import moe_route_reference

CPU = torch.device("cpu")
RUNNABLE = [impl for impl in ROUTE_IMPLS if impl.why_not(CPU, torch.float32) is None]
NAN, INF = float("nan"), float("inf")

needs_native = pytest.mark.skipif(len(RUNNABLE) == 1, reason=str(why_not_native_route(CPU, torch.float32)))
each_route = pytest.mark.parametrize("route", [i.fn for i in RUNNABLE], ids=[i.name for i in RUNNABLE])

Fn = Callable[..., Any]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_reference_route_is_topk_of_a_softmax_in_float64() -> None:
    logits = randn(20, 9, dtype=torch.float64)
    weights, experts, probabilities, counts = moe_route_reference(logits, 3, normalize=False, scale=2.0)
    best = torch.softmax(logits, -1).topk(3)
    torch.testing.assert_close(weights, 2 * best.values, rtol=1e-14, atol=0)
    assert torch.equal(experts.long(), best.indices)
    torch.testing.assert_close(probabilities, torch.softmax(logits, -1), rtol=1e-14, atol=0)
    assert counts.tolist() == torch.bincount(best.indices.flatten(), minlength=9).tolist()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_reference_normalized_weights_are_the_scores_divided_by_their_sum(scores: Any) -> None:
    weights, experts, probabilities, _ = moe_route_reference(randn(20, 9, dtype=torch.float64), 4, scores=scores)
    chosen = probabilities.gather(1, experts.long())
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True), rtol=1e-13, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_reference_route_gradients_are_those_of_finite_differences(scores: Any, normalize: bool) -> None:
    logits = randn(4, 6, dtype=torch.float64).requires_grad_()
    options = {"scores": scores, "normalize": normalize, "scale": 1.7, "bias": randn(6, seed=1), "groups": 3, "groups_kept": 2}
    assert torch.autograd.gradcheck(lambda x: moe_route_reference(x, 2, **options)[::2], (logits,))


@each_route
def test_a_tie_goes_to_the_lower_number(route: Fn) -> None:
    logits = torch.tensor([[1.0, 2, 2, 0, 2], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]]).bfloat16()
    assert route(logits, 3)[1].tolist() == [[1, 2, 4], [0, 1, 2], [1, 3, 0]]
    assert route(logits, 3, bias=torch.zeros(5))[1].tolist() == [[1, 2, 4], [0, 1, 2], [1, 3, 0]]
    # More equal ones than a vector holds, and than are looked at together.
    for num_experts in (16, 40, 300):
        assert route(torch.ones(1, num_experts), num_experts)[1].tolist() == [list(range(num_experts))]


@each_route
def test_a_tie_of_groups_goes_to_the_lower_group(route: Fn) -> None:
    logits = torch.tensor([[0.0, 1, 1, 0, 1, 0, 0, 0]])
    assert route(logits, 2, groups=4, groups_kept=2)[1].tolist() == [[1, 2]]


@each_route
def test_only_experts_of_the_groups_whose_two_best_add_up_to_most_are_chosen(route: Fn) -> None:
    # Sums of the two best: 0.9 + 0.1, 0.6 + 0.6 (a tie inside the group), 0.8 + 0.3. The group of the best expert is left out.
    scores = torch.tensor([[0.9, 0.1, 0.1, 0.6, 0.2, 0.6, 0.8, 0.3, 0.2]])
    weights, experts, _, counts = route(scores.logit(), 3, scores="sigmoid", groups=3, groups_kept=2, scale=2.0)
    assert experts.tolist() == [[6, 3, 5]]
    torch.testing.assert_close(weights, torch.tensor([[0.8, 0.6, 0.6]]))
    assert counts.tolist() == [0, 0, 0, 1, 0, 1, 1, 0, 0]


@each_route
def test_the_bias_changes_the_choice_and_its_order_but_not_the_weights(route: Fn) -> None:
    scores = torch.tensor([[0.2, 0.4, 0.1, 0.3]])
    weights, experts, probabilities, _ = route(scores.log(), 2, bias=torch.tensor([0.0, -0.35, 1.0, 0.0]), normalize=False)
    assert experts.tolist() == [[2, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.1, 0.3]]))
    torch.testing.assert_close(probabilities, scores)


@each_route
def test_no_gradient_flows_to_the_bias_or_through_the_choice(route: Fn) -> None:
    logits, bias = randn(5, 6).requires_grad_(), randn(6, seed=1).requires_grad_()
    weights, experts, probabilities, counts = route(logits, 2, bias=bias)
    assert not experts.requires_grad and not counts.requires_grad
    (weights.square().sum() + probabilities.square().sum()).backward()
    assert bias.grad is None and logits.grad is not None


@each_route
def test_chosen_experts_without_probability_still_share_the_weight_as_their_softmax(route: Fn) -> None:
    logits = torch.tensor([[0.0, -200.0, -201.0, -300.0]], requires_grad=True)
    weights, experts, probabilities, _ = route(logits, 2, bias=torch.tensor([0.0, 3.0, 2.0, 0.0]))
    assert experts.tolist() == [[1, 2]] and probabilities[0, 1:].eq(0).all()
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0]]).sub(torch.tensor([[1.0, -1.0]]) * torch.tensor(-1.0).sigmoid()))
    (grad,) = torch.autograd.grad(weights[0, 0], logits)
    slope = float(torch.tensor(1.0).sigmoid() * torch.tensor(-1.0).sigmoid())
    torch.testing.assert_close(grad, torch.tensor([[0.0, slope, -slope, 0.0]]))


@each_route
def test_sigmoids_of_large_logits_neither_overflow_nor_divide_by_zero(route: Fn) -> None:
    logits = torch.tensor([[-500.0, -600, -700], [1e4, 90, -1e4]], requires_grad=True)
    weights, experts, probabilities, _ = route(logits, 2, scores="sigmoid")
    assert experts.tolist() == [[0, 1], [0, 1]]
    assert weights.tolist() == [[0, 0], [0.5, 0.5]] and probabilities.tolist() == [[0, 0, 0], [1, 1, 0]]
    (grad,) = torch.autograd.grad(weights.sum() + probabilities.sum(), logits)
    assert torch.isfinite(grad).all()


@each_route
@pytest.mark.parametrize("row", [[NAN, 1, 2, 3], [1, NAN, NAN, 0], [INF, 1, 2, 3], [-INF] * 4], ids=str)
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_logit_that_is_no_number_stays_visible_in_its_token_alone(route: Fn, scores: str, row: list[float]) -> None:
    logits = torch.tensor([[1.0, 3, 2, 2], row, [0, 3, 1, 2]])
    for options in ({}, {"bias": torch.zeros(4)}, {"groups": 2, "groups_kept": 2}):
        weights, experts, probabilities, _ = route(logits, 3, scores=scores, **options)
        assert torch.equal(experts, moe_route_reference(logits, 3, scores=scores, **options)[1])  # type: ignore[arg-type]
        assert sorted(set(experts[1].tolist())) == sorted(experts[1].tolist())
        assert torch.isfinite(weights[[0, 2]]).all() and torch.isfinite(probabilities[[0, 2]]).all()
        if scores == "softmax" or NAN in row:
            assert weights[1].isnan().all() and probabilities[1].isnan().any()


@each_route
def test_experts_masked_by_minus_infinity_come_last(route: Fn) -> None:
    weights, experts, _, _ = route(torch.tensor([[-INF, 1.0, -INF, 2.0, -INF]]), 4)
    assert experts.tolist() == [[3, 1, 0, 2]]
    torch.testing.assert_close(weights, torch.tensor([[1.0, -1.0]]).sigmoid().matmul(torch.eye(2, 4)))


@each_route
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, r"top_k \(0\) must be from 1 to .* \(6\)"),
        ({"top_k": 7}, r"top_k \(7\) must be from 1 to .* \(6\)"),
        ({"top_k": 3, "groups": 3, "groups_kept": 1}, r"top_k \(3\) must be from 1 to .* \(2\)"),
        ({"groups": 4}, r"groups \(4\) must be at least 1 and divide the number of experts \(6\)"),
        ({"groups": 3, "groups_kept": 4}, r"groups_kept \(4\) must be from 1 to groups \(3\)"),
        ({"scores": "tanh"}, r"scores \(tanh\) must be softmax or sigmoid"),
        ({"scale": 0.0}, r"scale \(0.0\) must be positive"),
        ({"bias": torch.zeros(5)}, r"bias \(5,\) must have one number for each of the 6 experts"),
        ({"logits": torch.zeros(6)}, r"logits \(6,\) must be \(tokens, experts\)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_route_refuses_what_it_cannot_do(route: Fn, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(2, 6), "top_k": 2, **change}
    with pytest.raises(ValueError, match=message):
        route(arguments.pop("logits"), arguments.pop("top_k"), **arguments)


@needs_native
def test_native_route_refuses_other_dtypes() -> None:
    with pytest.raises(RuntimeError, match="moe_route on CPU takes fp32 or bf16"):
        moe_route_native(torch.zeros(2, 6).double(), 2)
    with pytest.raises(RuntimeError, match="bias is Double; it must be Float"):
        moe_route_native(torch.zeros(2, 6), 2, bias=torch.zeros(6).double())


@needs_native
@pytest.mark.parametrize("used", [0, 2], ids=["weights", "probabilities"])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_native_route_gradient_is_right_when_one_result_is_unused(scores: Any, used: int) -> None:
    logits = randn(40, 21)
    grads = []
    for route in (moe_route_native, moe_route_reference):
        leaf = logits.clone().requires_grad_()
        out = route(leaf, 3, scores=scores, scale=1.3)[used]
        out.backward(randn(*out.shape, seed=3))
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)


@needs_native
@pytest.mark.parametrize(
    "options", [{}, {"scores": "sigmoid", "bias": randn(224), "groups": 7, "groups_kept": 3}], ids=["softmax", "groups"]
)
def test_native_route_of_many_tokens_is_the_reference(options: dict[str, Any]) -> None:
    # Probabilities large enough to be written past the caches.
    logits = randn(5000, 224)
    ours, theirs = moe_route_native(logits, 6, **options), moe_route_reference(logits, 6, **options)
    # fp32 scores of 224 experts with a bias can be equal but for the last digit: one choice in 30000 may then be another.
    assert (ours[1] != theirs[1]).sum() <= (3 if options else 0)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=1e-8)
    assert ours[3].sum() == 30000
    if not options:
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-8)


def test_why_not_native_names_the_dtypes_it_takes() -> None:
    assert "torch.bfloat16, not torch.float64" in str(why_not_native_route(CPU, torch.float64))
