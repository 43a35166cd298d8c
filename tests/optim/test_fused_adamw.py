from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dist_llm.kernels.adamw import IMPLS
from dist_llm.kernels.adamw.reference import adamw_step_reference
from dist_llm.optim.fused_adamw import FusedAdamW

CPU = torch.device("cpu")
RUNNABLE = [impl for impl in IMPLS if impl.why_not(CPU, torch.float32) is None]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5,), (2, 2))]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1], "lr_scale": 0.5}, {"params": params[1:], "weight_decay": 0.0}]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def assert_equal_to_roundings(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("impl", RUNNABLE, ids=lambda impl: impl.name)
def test_steps_are_those_of_torchs_fused_adamw(impl: Any) -> None:
    ours, theirs = parameters(), parameters()
    run(FusedAdamW(groups(ours), **OPTIONS, adamw_step=impl.fn), ours, range(1, 20))
    run(torch.optim.AdamW(groups(theirs), **OPTIONS, fused=True), theirs, range(1, 20))
    assert_equal_to_roundings(ours, theirs)


def test_by_torchs_own_kernel_the_steps_are_torchs_bit_for_bit() -> None:
    ours, theirs = parameters(), parameters()
    run(FusedAdamW(groups(ours), **OPTIONS), ours, range(1, 9))
    run(torch.optim.AdamW(groups(theirs), **OPTIONS, fused=True), theirs, range(1, 9))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("saved_by", ["torch", "ours"])
def test_a_state_of_either_continues_in_the_other(saved_by: str) -> None:
    def make(kind: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        if kind == "ours":
            return FusedAdamW(groups(params), **OPTIONS)
        return torch.optim.AdamW(groups(params), **OPTIONS, fused=True)

    straight, stopped = parameters(), parameters()
    run(make("torch", straight), straight, range(1, 7))
    first = make(saved_by, stopped)
    run(first, stopped, range(1, 4))
    second = make("ours" if saved_by == "torch" else "torch", stopped)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, stopped, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))


def test_the_saved_form_has_the_keys_of_torchs() -> None:
    ours, theirs = parameters(), parameters()
    mine, other = FusedAdamW(groups(ours), **OPTIONS), torch.optim.AdamW(groups(theirs), **OPTIONS, fused=True)
    for optimizer, params in ((mine, ours), (other, theirs)):
        run(optimizer, params, range(1, 3))
    assert mine.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    for index, state in other.state_dict()["state"].items():
        found = mine.state_dict()["state"][index]
        assert {key: (t.dtype, t.shape) for key, t in found.items()} == {key: (t.dtype, t.shape) for key, t in state.items()}


def test_the_state_of_another_variant_is_refused() -> None:
    theirs = torch.optim.AdamW(parameters(), **OPTIONS, amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True, which FusedAdamW does not compute"):
        FusedAdamW(parameters(), **OPTIONS).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("impl", RUNNABLE, ids=lambda impl: impl.name)
def test_a_factor_clips_as_torch_does_beforehand(impl: Any) -> None:
    ours, theirs = parameters(), parameters()
    mine, other = FusedAdamW(ours, **OPTIONS, adamw_step=impl.fn), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for step in range(1, 5):
        for params in (ours, theirs):
            give_gradients(params, step)
        norm = torch.nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(theirs, 0.5, norm)
        other.step()
        mine.step(grad_scale=(0.5 / (norm + 1e-6)).clamp(max=1.0))
    assert_equal_to_roundings(ours, theirs)


@pytest.mark.parametrize("impl", RUNNABLE, ids=lambda impl: impl.name)
def test_gradients_of_copies_update_their_masters_and_the_copies_follow(impl: Any) -> None:
    masters, plain = parameters(), parameters()
    copies = {master: nn.Parameter(master.detach().bfloat16()) for master in masters}
    mine, other = FusedAdamW(masters, **OPTIONS, adamw_step=impl.fn), FusedAdamW(plain, **OPTIONS, adamw_step=adamw_step_reference)
    for step in (1, 2, 3):
        give_gradients(list(copies.values()), step)
        for param, twin in zip(plain, copies.values(), strict=True):
            assert twin.grad is not None
            param.grad = twin.grad.float()
        mine.step(copies=copies)
        other.step()
    assert_equal_to_roundings(masters, plain)
    assert all(torch.equal(twin.detach(), master.detach().bfloat16()) for master, twin in copies.items())


def test_parameters_that_joined_later_count_their_own_steps() -> None:
    ours, theirs = parameters(), parameters()
    mine, other = FusedAdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for step in (1, 2, 3):
        for optimizer, params in ((mine, ours), (other, theirs)):
            give_gradients(params, step)
            if step == 1:
                params[0].grad = None
            optimizer.step()
    assert [mine.state[p]["step"].item() for p in ours] == [2.0, 3.0, 3.0]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_float64_parameters_train_in_float64() -> None:
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    run(FusedAdamW(ours, **OPTIONS), ours, range(1, 4))
    run(torch.optim.AdamW(theirs, **OPTIONS, foreach=False), theirs, range(1, 4))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_a_closure_is_called_with_gradients_enabled_and_its_loss_returned() -> None:
    params = parameters()
    optimizer = FusedAdamW(params, **OPTIONS)

    def closure() -> torch.Tensor:
        loss = sum((p.square().sum() for p in params), torch.zeros(()))
        loss.backward()
        return loss

    before = [p.detach().clone() for p in params]
    assert optimizer.step(closure).item() > 0
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_sparse_gradients_and_missing_copies_are_refused() -> None:
    params = parameters()
    give_gradients(params, 1)
    with pytest.raises(ValueError, match=r"a parameter \(5,\) has no copy"):
        FusedAdamW(params, **OPTIONS).step(copies={params[0]: params[0].detach().bfloat16()})
    weight = nn.Parameter(torch.zeros(4, 2))
    weight.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(ValueError, match=r"parameter \(4, 2\) is sparse"):
        FusedAdamW([weight], **OPTIONS).step()
