from __future__ import annotations

import math

import pytest
import torch

from dist_llm.data.rows import IGNORE
from dist_llm.objectives.next_token import next_token_nll


def make(dtype: torch.dtype, *, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    hidden = (scale * torch.randn(3, 7, 10, generator=generator)).to(dtype)
    head = torch.randn(29, 10, generator=generator)
    targets = torch.randint(0, 29, (3, 7), generator=generator)
    targets[0, 2] = targets[2] = IGNORE
    return hidden, head, targets


def exact_nll(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log of softmax at each valid target, one by one, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for h, target in zip(hidden.flatten(0, 1), targets.flatten().tolist(), strict=True):
        if target != IGNORE:
            logits = head @ h
            total = total + torch.logsumexp(logits, 0) - logits[target]
    return total


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["", "large logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loss_and_gradients_are_those_of_the_definition(dtype: torch.dtype, scale: float) -> None:
    hidden, head, targets = make(dtype, scale=scale)
    leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    loss = next_token_nll(*leaves, targets, ignore=IGNORE)
    grads = torch.autograd.grad(loss, leaves)
    wide = [hidden.double().requires_grad_(), head.to(dtype).double().requires_grad_()]
    exact = exact_nll(*wide, targets)
    exact_grads = torch.autograd.grad(exact, wide)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert [g.dtype for g in grads] == [dtype, torch.float32]
    eps = torch.finfo(dtype).eps
    largest_logit = float((wide[1].detach() @ wide[0].detach().flatten(0, 1).T).abs().max())
    # Each logit is rounded to the dtype: an error of half an ulp of itself, which the loss of a token carries on.
    assert abs(float(loss.detach()) - float(exact.detach())) <= int((targets != IGNORE).sum()) * largest_logit * eps
    for ours, truth in zip(grads, exact_grads, strict=True):
        assert float((ours.double() - truth).abs().max() / truth.abs().max()) <= (4 + 2 * largest_logit) * eps


def test_ignored_targets_count_nothing() -> None:
    hidden, head, targets = make(torch.float32)
    leaf = hidden.clone().requires_grad_()
    next_token_nll(leaf, head, targets, ignore=IGNORE).backward()
    ignored = targets == IGNORE
    assert not leaf.grad[ignored].any()
    assert leaf.grad[~ignored].any(dim=-1).all()
    changed = hidden.clone()
    changed[ignored] = 100.0
    assert torch.equal(next_token_nll(changed, head, targets, ignore=IGNORE), next_token_nll(hidden, head, targets, ignore=IGNORE))


def test_a_batch_without_targets_has_loss_zero_and_gradient_zero() -> None:
    hidden, head, targets = make(torch.float32)
    leaf = head.clone().requires_grad_()
    loss = next_token_nll(hidden, leaf, torch.full_like(targets, IGNORE), ignore=IGNORE)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not leaf.grad.any()


def test_equal_logits_cost_log_of_the_vocabulary() -> None:
    loss = next_token_nll(torch.zeros(2, 3, 4), torch.randn(50, 4), torch.zeros(2, 3, dtype=torch.int64), ignore=IGNORE)
    assert float(loss) == pytest.approx(6 * math.log(50), rel=1e-6)


def test_losses_of_parts_add_up() -> None:
    hidden, head, targets = make(torch.float32)
    parts = sum(float(next_token_nll(hidden[i : i + 1], head, targets[i : i + 1], ignore=IGNORE)) for i in range(3))
    assert float(next_token_nll(hidden, head, targets, ignore=IGNORE)) == pytest.approx(parts, rel=1e-6)
