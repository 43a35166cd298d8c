"""Predicted bytes of a rank against those counted on running ranks, and against runs that were published."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.config.load import load_config
from dist_llm.config.schema import RunConfig
from dist_llm.kernels.extension import why_no_kernel
from dist_llm.parallel.ranks import run_on_ranks
from dist_llm.planning.activations import kept_for_backward
from dist_llm.planning.bookkeeping import published_bookkeeping
from dist_llm.planning.count import parameter_shapes
from dist_llm.planning.count_shapes import shape_params
from dist_llm.planning.in_flight import in_flight
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.memory import layout_of, rank_bytes, rank_states
from dist_llm.planning.memory_plot import draw_memory
from dist_llm.planning.published import SkipRow, parse_row, read_rows
from dist_llm.planning.rank_memory import memory_of
from dist_llm.planning.saving import Kernels, saving_of
from dist_llm.planning.shapes import ModelShape, from_config
from dist_llm.planning.shards import local_shape
from dist_llm.planning.stage_tensors import stages_of, tensors_of
from dist_llm.planning.stages import stage_layers
from dist_llm.topology.layout import Layout
from dist_llm.topology.schedule import orders, peak_in_flight
from dist_llm.verify.shrink import apply_layout, shrink
from tests.planning.memory_program import count_saved, count_states
from tests.timing import best_cpu_seconds

ROOT = Path(__file__).parents[2]
# 2001 rows are not divisible by two ranks, and the table is above the size up to which ZeRO-3 keeps tensors gathered.
VOCAB = 2001

LLAMA_70B = ModelShape(80, 8192, 64, 8, 128, 28672, True, 128256, 8192, False)
MIXTRAL = ModelShape(32, 4096, 32, 8, 128, 14336, True, 32000, 4096, False, num_experts=8, experts_per_token=2)


def small(name: str, precision: str, layout: Layout, **model: Any) -> RunConfig:
    config = apply_layout(shrink(load_config(ROOT / "configs" / "tiny" / f"{name}.yaml", []).config), layout)
    train = config.train.model_copy(update={"engine": "deepspeed", "batch_size": 12 if layout.dp == 3 else 8})
    shape = config.model.model_copy(update={"vocab_size": VOCAB, **model})
    return config.model_copy(update={"precision": precision, "model": shape, "train": train})


def states_configs(dp: int, tp: int, pp: int) -> list[RunConfig]:
    zeros = (0, 1) if pp > 1 else (0, 1, 2, 3)
    cases = [(zero, precision) for zero in zeros for precision in ("fp32", "bf16")]
    layout = {zero: Layout(dp=dp, tp=tp, pp=pp, zero=zero) for zero in zeros}  # type: ignore[arg-type]
    # Tied with biases and learned positions; untied with fewer key-value heads. On many ranks each case takes one of the two.
    both = dp * tp * pp <= 2
    names = [("gpt2", "llama") if both else (("gpt2", "llama")[(zero + (precision == "bf16")) % 2],) for zero, precision in cases]
    return [small(name, precision, layout[zero]) for (zero, precision), of in zip(cases, names, strict=True) for name in of]


@pytest.mark.parametrize(("dp", "tp", "pp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2), (2, 2, 2)])
def test_states_are_predicted_to_the_byte_on_every_rank(dp: int, tp: int, pp: int) -> None:
    compare_states(states_configs(dp, tp, pp), dp, tp, pp)


def test_states_are_exact_where_flat_buffers_are_filled_up() -> None:
    # Width 51 makes odd sizes, and 3 ranks divide few of them: each group and each tensor of ZeRO-3 is filled up.
    odd = {"d_model": 51, "ffn_dim": 77}
    configs = [small("gpt2", p, Layout(dp=3, zero=zero), **odd) for zero in (1, 2, 3) for p in ("fp32", "bf16")]  # type: ignore[arg-type]
    matrices = sum(math.prod(s) for s in parameter_shapes(configs[0].model).values() if len(s) == 2)
    assert matrices % 6 != 0
    compare_states(configs, 3, 1, 1)


def compare_states(configs: list[RunConfig], dp: int, tp: int, pp: int) -> None:
    ranks = dp * tp * pp
    answers = run_on_ranks(count_states, dp=dp, tp=tp, pp=pp, args=([c.model_dump() for c in configs],), deadline_s=240)
    for i, config in enumerate(configs):
        for counted in (answer[i] for answer in answers):
            planned = rank_states(config, ranks, stage=counted["stage"], tp_rank=counted["tp_rank"], zero_rank=counted["zero_rank"])
            told = {key: getattr(planned, key) for key in ("parameters", "gradients", "masters", "moments")}
            case = f"{config.name} zero {config.parallel.zero} {config.precision} {counted}"
            assert told == {key: counted[key] for key in told}, case
            if i == 0:
                # Nothing of a page or more is missing in the lists (the engines of later cases share a process with earlier
                # ones); below are vectors, and what the lent head's gradient, sent away by then, leaves.
                lent = (
                    4
                    * tensors_of(
                        from_config(config.model, 32), stages_of(from_config(config.model, 32), pp)[counted["stage"]], tp
                    ).lent_head
                )
                assert -100_000 - lent < counted["all"] - sum(told.values()) < 40_000, case


SAVED_CASES = {
    (2, 1, 1): [("gpt2", False), ("gpt2", True), ("llama", True), ("packed", False), ("packed", True)],
    (1, 2, 1): [("gpt2", False), ("llama", False)],
    (2, 2, 1): [("gpt2", True), ("llama", False)],
    (1, 1, 2): [("gpt2", False), ("llama", False), ("packed", False)],
}


@pytest.mark.parametrize(("tp", "pp", "cp"), list(SAVED_CASES))
def test_activations_are_predicted_within_a_hundredth_of_what_autograd_saves(tp: int, pp: int, cp: int) -> None:
    if reason := why_no_kernel("attention", torch.device("cpu")):
        pytest.skip(reason)  # what plain PyTorch keeps is compared below
    configs = []
    for name, sequence in SAVED_CASES[tp, pp, cp]:
        for recompute in ("none", "selective", "full"):
            for kind in ("ring", "all_to_all") if cp > 1 and name != "packed" else ("ring",):
                layout = Layout(tp=tp, pp=pp, cp=cp, zero=1, sequence_parallel=sequence, recompute=recompute, cp_kind=kind)  # type: ignore[arg-type]
                configs += [small(name, precision, layout) for precision in ("fp32", "bf16")]
    # Not in the plan are document numbers, 4 bytes a token or, gathered over cp, a little more.
    compare_saved(configs, tp, pp, cp, low=1.0)


@pytest.mark.parametrize(("tp", "pp", "cp"), [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_what_auto_keeps_on_a_gpu_is_predicted_within_a_hundredth(tp: int, pp: int, cp: int) -> None:
    # Torch's attention (it has no blocks for the ring: the definition's), and plain PyTorch for the rest.
    configs = []
    for name in ("gpt2", "llama", "banded"):
        kind = "ring" if name == "llama" else "all_to_all"
        for precision in ("fp32", "bf16"):
            config = small(name, precision, Layout(tp=tp, pp=pp, cp=cp, zero=1, sequence_parallel=tp > 1, cp_kind=kind))  # type: ignore[arg-type]
            chosen = dict.fromkeys(("activation", "cross_entropy", "layer_norm", "rms_norm", "rotary"), "reference")
            chosen["attention"] = "reference" if cp > 1 and kind == "ring" else "sdpa"
            configs.append(config.model_copy(update={"kernels": config.kernels.model_copy(update=chosen)}))
    compare_saved(configs, tp, pp, cp, low=0.99)


def compare_saved(configs: list[RunConfig], tp: int, pp: int, cp: int, *, low: float) -> None:
    answers = run_on_ranks(count_saved, tp=tp, pp=pp, cp=cp, args=([c.model_dump() for c in configs],), deadline_s=240)
    for i, config in enumerate(configs):
        for counted in (answer[i] for answer in answers):
            if counted["tp_rank"]:
                continue  # it has fewer rows of the odd vocabulary than the plan's rank
            planned = saved_by_plan(config, tp * pp * cp, counted["stage"])
            case = f"{config.name} {config.precision} {config.parallel} {counted} {planned}"
            assert planned * low <= counted["bytes"] <= planned * 1.01, case


def saved_by_plan(config: RunConfig, ranks: int, number: int) -> int:
    """Of one micro-batch. A checkpoint holds the rotary tables outside of autograd's sight."""
    model, layout = from_config(config.model, config.data.seq_len), layout_of(config, ranks)
    exchanges = config.parallel.cp_kind == "all_to_all"
    saving = saving_of(Kernels.of(config), model, "cpu", config.precision)
    kept = kept_for_backward(model, layout, 4 if config.precision == "fp32" else 2, saving, exchanges_heads=exchanges)
    stage = stages_of(model, layout.pp)[number]
    lent = kept.lent_head if model.tied and stage.is_last and not stage.is_first else 0
    blocks = stage.layers * kept.layer + sum(stage.windowed) * kept.window
    ends = stage.is_first * kept.first + stage.is_last * (kept.last + kept.logits) + lent
    return blocks + (kept.shared if layout.recompute == "none" else 0) + ends


def test_no_published_run_that_ran_is_called_impossible() -> None:
    shares, rows = [], read_rows(ROOT / "tests" / "data" / "published_runs.csv")
    too_much = []
    for row in rows:
        try:
            run = parse_row(row)
        except SkipRow:
            continue
        books = published_bookkeeping(
            row["system"],
            precision=run.layout.precision,
            gradient=run.system.software.grad_bytes,
            note=row["note"],
            fused=run.system.software.attention == "fused",
        )
        # A row that does not say what was recomputed is impossible only if no choice fits.
        is_said = row["recompute"] and not re.search(r"(recompute|AC fraction)[^;=]*not (stated|in |restate)", row["note"])
        choices = [run.layout.recompute] if is_said else ["none", "selective", "full"]
        needed = min(
            memory_of(run.model, replace(run.layout, recompute=choice), precision=run.layout.precision, bookkeeping=books).total  # type: ignore[arg-type]
            for choice in choices
        )
        if needed > run.cluster.memory_bytes:
            too_much.append(f"{row['id']}: {needed / 1e9:.1f} GB of {run.cluster.memory_bytes / 1e9:.0f}")
        if is_said:
            shares.append(needed / run.cluster.memory_bytes)
    assert not too_much, too_much
    assert len(shares) > 200
    # Whoever runs on hundreds of GPUs fills them: a prediction that is far too small would show here.
    assert sorted(shares)[len(shares) // 2] > 0.6


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ["gpt2", "llama", "packed"])
def test_tensors_of_a_shape_are_those_of_the_config(name: str, tp: int) -> None:
    model = small(name, "fp32", Layout()).model
    shape = from_config(model, 32)
    for rank in range(tp):
        expected = sorted(math.prod(local_shape(n, s, model, tp, rank)) for n, s in parameter_shapes(model).items())
        (stage,) = stages_of(shape, 1)
        tensors = tensors_of(shape, stage, tp, tp_rank=rank)
        assert sorted(size for t, count in tensors.counted() for size in [t.size] * count) == expected
        order = [math.prod(local_shape(n, s, model, tp, rank)) for n, s in parameter_shapes(model).items() if len(s) == 2]
        assert tensors.in_order(decayed=True) == order


@pytest.mark.parametrize("pp", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "model",
    [
        LLAMA_70B,
        MIXTRAL,
        replace(MIXTRAL, bias=True, norm="layer_norm", tied=True, shared_experts=1, expert_ffn_dim=100, dense_layers=3),
        replace(MIXTRAL, moe_every=2, gated=False, bias=True, learned_positions=64),
    ],
)
def test_stages_hold_every_parameter_once(model: ModelShape, pp: int) -> None:
    tensors = [tensors_of(model, stage, 1) for stage in stages_of(model, pp)]
    assert sum(t.size * count for of in tensors for t, count in of.counted()) == shape_params(model).total


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["gpt2", "llama", "banded"])
def test_stages_are_cut_as_the_trainer_cuts_them(name: str, pp: int) -> None:
    model = small(name, "fp32", Layout()).model
    if name == "banded":
        model = load_config(ROOT / "configs/tiny/banded.yaml").config.model
    for seq_len in (32, 64, 4096):
        ours = stages_of(from_config(model, seq_len), pp)
        assert [s.layers for s in ours] == [len(layers) for layers in stage_layers(model, seq_len, pp)]


@pytest.mark.parametrize(("pp", "virtual", "micro"), [(1, 1, 4), (2, 1, 8), (4, 1, 2), (4, 2, 8), (4, 3, 4), (8, 4, 16), (2, 2, 64)])
def test_micro_batches_in_flight_are_those_of_the_schedule(pp: int, virtual: int, micro: int) -> None:
    if pp == 1:
        assert in_flight(1, virtual, micro, 0) == (1,)
        return
    expected = [peak_in_flight(order) for order in orders("interleaved" if virtual > 1 else "1f1b", pp, micro, virtual)]
    assert [sum(in_flight(pp, virtual, micro, stage)) for stage in range(pp)] == expected


@pytest.mark.parametrize("virtual", [1, 4])
@pytest.mark.parametrize("model", [LLAMA_70B, replace(MIXTRAL, dense_layers=3)])
def test_the_fullest_stage_is_the_largest_of_all(model: ModelShape, virtual: int) -> None:
    for recompute in ("none", "full"):
        layout = LayoutShape(tp=4, pp=8, dp=4, global_batch=64, virtual_pp=virtual, recompute=recompute)  # type: ignore[arg-type]
        stages = [memory_of(model, layout, stage=stage) for stage in range(8)]
        assert memory_of(model, layout).total == max(rank.total for rank in stages)
        assert [rank.stage for rank in stages] == list(range(8))


def test_experts_are_divided_over_ep_and_their_state_over_the_copies() -> None:
    whole = memory_of(MIXTRAL, LayoutShape(dp=8, global_batch=8, zero=1))
    parts = memory_of(MIXTRAL, LayoutShape(dp=8, ep=8, global_batch=8, zero=1))
    experts = 32 * 8 * 3 * 4096 * 14336
    assert whole.parameters - parts.parameters == 2 * (experts - experts // 8)
    # One copy of each expert among 8 ranks either way: the divided optimiser keeps the same.
    assert whole.optimizer == parts.optimizer
    assert whole.masters == parts.masters


def test_each_way_to_save_memory_saves_it() -> None:
    base = LayoutShape(tp=8, dp=8, zero=1, global_batch=64)
    total = {zero: memory_of(LLAMA_70B, replace(base, zero=zero)).states for zero in (0, 1, 2, 3)}
    assert total[0] > total[1] > total[2] > total[3]
    kept = {r: memory_of(LLAMA_70B, replace(base, recompute=r)).activations for r in ("none", "selective", "full")}  # type: ignore[arg-type]
    assert kept["full"] < 0.05 * kept["none"]
    # A fused kernel keeps one number a query and head, which is all that recomputing attention saves, and less than a block of it costs.
    assert abs(kept["selective"] - kept["none"]) < 0.02 * kept["none"]
    some = memory_of(LLAMA_70B, replace(base, recompute="full"), recompute_layers=40).activations
    assert kept["full"] < some < kept["none"]
    assert some == pytest.approx((kept["full"] + kept["none"]) / 2, rel=0.02)
    assert memory_of(LLAMA_70B, replace(base, sequence_parallel=False)).activations > memory_of(LLAMA_70B, base).activations
    assert memory_of(LLAMA_70B, replace(base, cp=2, dp=4)).activations < 0.51 * memory_of(LLAMA_70B, base).activations
    assert memory_of(LLAMA_70B, replace(base, micro_batch=2)).activations == pytest.approx(
        2 * memory_of(LLAMA_70B, base).activations, rel=1e-3
    )
    away = memory_of(LLAMA_70B, base, offload_optimizer=True)
    assert (away.masters, away.optimizer, away.gradients) == (0, 0, 0)
    assert memory_of(LLAMA_70B, replace(base, zero=3), offload_parameters=True).parameters == 0


def test_the_fast_figures_of_a_config_are_the_exact_ones() -> None:
    for name in ("gpt2", "llama"):
        for zero in (0, 1, 2, 3):
            config = small(name, "bf16", Layout(dp=2, tp=2, zero=zero))  # type: ignore[arg-type]
            exact, quick = rank_states(config, 4), rank_bytes(config, 4)
            assert (quick.parameters, quick.gradients) == (exact.parameters, exact.gradients)
            assert (quick.masters, quick.optimizer) == (exact.masters, exact.moments)


def test_a_question_takes_under_a_fifth_of_a_millisecond() -> None:
    layouts = [
        LayoutShape(tp=tp, pp=pp, dp=8, zero=zero, micro_batch=micro, global_batch=64 * micro, recompute=recompute)  # type: ignore[arg-type]
        for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8) for zero in (0, 1) for micro in (1, 2, 4, 8) for recompute in ("none", "selective", "full")
    ]  # fmt: skip
    # 30 to 60 us where it was written; a search asks up to 10^5 times.
    assert best_cpu_seconds(lambda: [memory_of(LLAMA_70B, layout) for layout in layouts]) / len(layouts) < 200e-6


def test_impossible_questions_are_refused_with_their_numbers() -> None:
    with pytest.raises(ValueError, match="stage 8 is outside a pipeline of 8 stages"):
        memory_of(LLAMA_70B, LayoutShape(pp=8), stage=8)
    with pytest.raises(ValueError, match="80 layers cannot be cut into 81"):
        memory_of(LLAMA_70B, LayoutShape(pp=81))
    with pytest.raises(ValueError, match="3 ranks must be divisible by parallel"):
        layout_of(small("llama", "fp32", Layout(tp=2)), 3)


def test_bars_are_drawn(tmp_path: Path) -> None:
    layout = LayoutShape(tp=8, pp=4, dp=2, global_batch=32)
    path = tmp_path / "memory.png"
    draw_memory({f"stage {s}": memory_of(LLAMA_70B, layout, stage=s) for s in range(4)}, path, limit_bytes=80e9, title="70B")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="at least one bar"):
        draw_memory({}, path)
