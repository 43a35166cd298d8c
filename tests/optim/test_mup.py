"""muP as a switch of the config: what it scales, that nothing moves without it, and that every engine keeps the rates apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.comm.context import ParallelContext
from dist_llm.config.load import load_config
from dist_llm.config.schema import RunConfig
from dist_llm.engine.build import build_engine, build_model, choose_ops
from dist_llm.generate.context import Context
from dist_llm.models.decoder import Decoder
from dist_llm.optim.adamw import build_adamw, set_learning_rate
from dist_llm.parallel.ranks import run_on_ranks
from dist_llm.planning.mup import parameter_kind
from dist_llm.topology.layout import parse_layout
from dist_llm.verify.figures import take_steps
from dist_llm.verify.rows import MadeUpRows
from dist_llm.verify.run import verify_layouts
from dist_llm.verify.shrink import apply_layout, shrink

ROOT = Path(__file__).parents[2]
M = 4  # width over base width in these tests


def config_of(tiny: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / "tiny" / f"{tiny}.yaml", ["train.engine=plain", *overrides]).config


def with_mup(tiny: str, *overrides: str) -> RunConfig:
    width = config_of(tiny).model.d_model
    return config_of(tiny, f"model.mup_base_width={width // M}", *overrides)


def model_of(config: RunConfig) -> Decoder:
    return build_model(config, choose_ops(config, ParallelContext(device=torch.device("cpu"))))


@pytest.mark.parametrize("tiny", ["llama", "gpt2"])
def test_hidden_matrices_alone_start_smaller_and_learn_slower(tiny: str) -> None:
    config = with_mup(tiny)
    plain, scaled = model_of(config_of(tiny)), model_of(config)
    before, after = plain.initial_weights(1), scaled.initial_weights(1)
    optimizer = build_adamw(scaled.named_parameters(), config.optim, config.model)
    set_learning_rate(optimizer, 0.5)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    seen = set()
    for name, parameter in scaled.named_parameters():
        kind = parameter_kind(name, tuple(parameter.shape))
        seen.add(kind)
        is_hidden = kind == "hidden"
        # The root of 4 and its inverse are exact in floating point.
        assert torch.equal(after[name], before[name] / (2 if is_hidden else 1)), name
        assert group_of[id(parameter)]["lr"] == (0.125 if is_hidden else 0.5), name
        decay = 0.0 if kind == "vector" else config.optim.weight_decay * (M if is_hidden else 1)
        assert group_of[id(parameter)]["weight_decay"] == decay, name
    assert seen == ({"input", "vector", "hidden", "output"} if tiny == "llama" else {"input", "vector", "hidden"})
    assert len(group_of) == len(list(scaled.parameters()))


def test_every_change_of_the_rate_keeps_the_ratio() -> None:
    config = with_mup("llama")
    optimizer = build_adamw(model_of(config).named_parameters(), config.optim, config.model)
    for lr in (1e-3, 3e-4, 0.0):
        set_learning_rate(optimizer, lr)
        assert sorted({group["lr"] for group in optimizer.param_groups}) == sorted({lr / M, lr})


@pytest.mark.parametrize("tiny", ["llama", "gpt2"])
def test_logits_are_divided_by_the_ratio_in_training_and_in_generation(tiny: str) -> None:
    # The base head is as large as this model's, so that attention stays the same, and weights are loaded, so that they do.
    plain_config = config_of(tiny)
    head = f"model.mup_base_head_dim={plain_config.model.head_size}"
    plain, scaled = model_of(plain_config), model_of(with_mup(tiny, head))
    weights = plain.initial_weights(3)
    plain.load_weights(weights)
    scaled.load_weights(weights)
    tokens = torch.arange(10)[None]
    positions = torch.arange(10)[None]
    assert torch.equal(scaled(tokens, positions) * M, plain(tokens, positions))
    logits = [Context(model, tokens[0].tolist(), max_new_tokens=1).next_logits() for model in (plain, scaled)]
    assert torch.equal(logits[1] * M, logits[0])


@pytest.mark.parametrize(
    ("overrides", "scale"),
    [
        ([], 16**-0.5),
        (["model.mup_base_width=16"], 4**0.5 / 16),  # four heads at both widths: of 4 there, of 16 here
        (["model.mup_base_width=16", "model.head_dim=16"], 16**-0.5),  # more heads, of the same size
        (["model.mup_base_width=16", "model.mup_base_head_dim=9"], 3 / 16),
        (["model.mup_base_width=2"], math.sqrt(0.5) / 16),
    ],
)
def test_scores_are_divided_by_the_head_size(overrides: list[str], scale: float) -> None:
    model = model_of(config_of("llama", *overrides))
    assert all(block.attention.scale == pytest.approx(scale, rel=1e-15) for block in model.blocks.values())


def figures_of(config: RunConfig) -> dict[str, torch.Tensor]:
    return take_steps(config, ParallelContext(device=torch.device("cpu")), MadeUpRows(config)).to_tensors()


@pytest.mark.parametrize("tiny", ["llama", "gpt2"])
def test_at_the_base_width_nothing_changes_bit_for_bit(tiny: str) -> None:
    config = shrink(config_of(tiny))
    width = config.model.d_model
    at_base = config.model_copy(update={"model": config.model.model_copy(update={"mup_base_width": width})})
    above = config.model_copy(update={"model": config.model.model_copy(update={"mup_base_width": width // 2})})
    plain, same, other = figures_of(config), figures_of(at_base), figures_of(above)
    assert all(torch.equal(same[name], tensor) for name, tensor in plain.items())
    assert not torch.equal(other["losses"], plain["losses"])


def test_verify_keeps_the_ratio_of_a_config() -> None:
    small = shrink(config_of("llama", "model.mup_base_width=32", "model.d_model=96", "model.num_heads=6", "model.num_kv_heads=2"))
    assert small.model.mup_base_width is not None
    assert small.model.d_model / small.model.mup_base_width == pytest.approx(3, rel=0.05)  # whole numbers
    assert small.model.head_size / small.model.mup_base_head_size == pytest.approx(3, rel=0.1)
    assert shrink(config_of("llama")).model.mup_base_width is None


def moved_in_one_step(ctx: ParallelContext, config: dict[str, Any]) -> dict[str, float]:
    """The largest change of each parameter in the first step, on the main rank; without decay AdamW's is the rate of its group."""
    run = RunConfig.model_validate(config)
    engine = build_engine(run, ctx, choose_ops(run, ctx), None)
    before = {name: tensor.detach().clone() for section, name, tensor in engine.state() if section == "weights"}
    engine.close()
    after = take_steps(run, ctx, MadeUpRows(run), steps=1).weights
    return {name: float((after[name] - tensor).abs().max()) for name, tensor in before.items()} if ctx.is_main else {}


def moved_by_each(ctx: ParallelContext, configs: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [moved_in_one_step(ctx, config) for config in configs]


def test_deepspeed_keeps_the_rates_apart_at_every_stage_and_in_both_precisions() -> None:
    small = shrink(with_mup("llama", "train.engine=deepspeed", "optim.weight_decay=0", "optim.clip_norm=0"))
    # eps far below every gradient: the first update of AdamW is then the rate times the gradient's sign.
    small = small.model_copy(update={"optim": small.optim.model_copy(update={"lr": 1e-3, "eps": 1e-12})})
    cases = [(zero, precision) for zero in range(4) for precision in ("fp32", "bf16")]
    configs = [
        apply_layout(small, parse_layout(f"zero{zero}-dp2")).model_copy(update={"precision": precision}).model_dump(mode="json")
        for zero, precision in cases
    ]
    answers = run_on_ranks(moved_by_each, dp=2, args=(configs,), deadline_s=120)[0]
    for case, moved in zip(cases, answers, strict=True):
        for name, change in moved.items():
            is_hidden = parameter_kind(name, (2,) if "norm" in name else (2, 2)) == "hidden"
            # 1e-3 of the rate: the rounding of a weight near 0.1 in fp32, 7e-9 beside 2.5e-4, and of a gain near 1, 6e-8 beside 1e-3.
            assert change == pytest.approx(1e-3 / (M if is_hidden else 1), rel=1e-3), (case, name)


def test_layouts_agree_with_one_process_under_mup() -> None:
    small = shrink(with_mup("llama"))
    result = verify_layouts(small, [parse_layout(name) for name in ("tp2", "pp2", "zero1-dp2", "zero3-dp2")])
    assert not result.refused
    assert result.ok, [(outcome.layout, outcome.difference, outcome.error) for outcome in result.outcomes]
