from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dist_llm.config.load import load_config
from dist_llm.config.schema import OptimConfig
from dist_llm.kernels.attention.reference import attention_reference
from dist_llm.kernels.rms_norm.reference import rms_norm_reference
from dist_llm.models.decoder import Decoder
from dist_llm.models.ops import Ops
from dist_llm.optim.adamw import build_adamw, set_learning_rate

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["llama", "gpt2", "packed"])
def test_matrices_are_decayed_and_vectors_are_not_and_each_is_in_one_group(name: str) -> None:
    config = load_config(ROOT / "configs" / "tiny" / f"{name}.yaml").config
    ops = Ops(rms_norm=rms_norm_reference, attention=attention_reference)
    model = Decoder(config.model, ops, compute_dtype=torch.float32)
    optimizer = build_adamw(model.named_parameters(), config.optim)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay) == len(list(model.parameters()))
    for parameter_name, parameter in model.named_parameters():
        is_vector = parameter_name.endswith(".bias") or "norm" in parameter_name
        assert decay[id(parameter)] == (0.0 if is_vector else config.optim.weight_decay), parameter_name


def test_a_model_without_vectors_has_one_group() -> None:
    assert len(build_adamw([("w", nn.Parameter(torch.zeros(2, 2)))], OptimConfig(lr=1.0)).param_groups) == 1


def test_three_steps_are_those_of_the_formula() -> None:
    optim = OptimConfig(lr=0.1, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3)
    generator = torch.Generator().manual_seed(1)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in {"w": (3, 4), "b": (5,)}.items()}
    optimizer = build_adamw(parameters.items(), optim)
    exact = {name: p.detach().double() for name, p in parameters.items()}
    first = {name: torch.zeros_like(x) for name, x in exact.items()}
    second = {name: torch.zeros_like(x) for name, x in exact.items()}
    for step, lr in enumerate((0.1, 0.05, 0.2), 1):
        set_learning_rate(optimizer, lr)
        for name, parameter in parameters.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            g = parameter.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            update = (first[name] / (1 - 0.8**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-6)
            exact[name] = exact[name] * (1 - lr * (0.3 if name == "w" else 0.0)) - lr * update
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach().double(), exact[name], rtol=1e-5, atol=1e-6)


def test_the_rate_of_a_step_reaches_every_group() -> None:
    parameters = [("w", nn.Parameter(torch.zeros(2, 2))), ("b", nn.Parameter(torch.zeros(2)))]
    optimizer = build_adamw(parameters, OptimConfig(lr=1.0))
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
