"""Recomputation keeps less for the backward pass and changes no bit of a gradient."""

from __future__ import annotations

import pytest
import torch

from dist_llm.engine.base import DeviceBatch, LossModule
from dist_llm.engine.batches import StepBatches
from dist_llm.engine.build import build_model, choose_ops
from dist_llm.verify.rows import MadeUpRows
from tests.engine.layout_program import ALONE, config_at

# dropout: what is dropped must be the same in the second pass.
KINDS = {"llama": [], "gpt2": ["model.dropout=0.2"], "packed": []}


def run(tiny: str, words: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients by name, and bytes of distinct storages kept between forward and backward, parameters not counted."""
    config = config_at(tiny, [*KINDS[tiny], *words])
    model = build_model(config, choose_ops(config, ALONE))
    model.load_weights(model.initial_weights(config.seed))
    module = LossModule(model)
    batches, _ = StepBatches(MadeUpRows(config), config, ALONE).at(0)
    batch: DeviceBatch = batches[0]
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(batch)
    saved = sum(kept.values())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, saved


@pytest.mark.parametrize("tiny", KINDS)
def test_each_kind_of_recomputation_gives_the_same_bits_and_keeps_less(tiny: str) -> None:
    loss, grads, all_kept = run(tiny, [])
    ways = {
        "selective": ["parallel.recompute=selective"],
        "full of 2": ["parallel.recompute=full", "parallel.recompute_layers=2"],
        "full": ["parallel.recompute=full"],
    }
    kept = {}
    for name, words in ways.items():
        its_loss, its_grads, kept[name] = run(tiny, words)
        assert torch.equal(its_loss, loss) and its_grads.keys() == grads.keys()
        assert all(torch.equal(its_grads[key], grads[key]) for key in grads), name
    print(f"{tiny}: none {all_kept}, {kept}")
    assert all_kept > kept["selective"] > kept["full of 2"] > kept["full"]
    # Four blocks of which nothing but the input is kept, beside final norm, head and loss.
    assert kept["full"] < 0.5 * all_kept
    # Two of four blocks: half of what all four save.
    assert abs((all_kept - kept["full of 2"]) - (all_kept - kept["full"]) / 2) < 0.02 * all_kept


def test_selective_in_some_layers_keeps_more_than_in_all() -> None:
    loss, grads, some = run("llama", ["parallel.recompute=selective", "parallel.recompute_layers=1"])
    plain_loss, plain_grads, none = run("llama", [])
    _, _, every = run("llama", ["parallel.recompute=selective"])
    assert torch.equal(loss, plain_loss) and all(torch.equal(grads[key], plain_grads[key]) for key in plain_grads)
    assert none > some > every
