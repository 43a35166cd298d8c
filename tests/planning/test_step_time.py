from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dist_llm.config.load import load_config
from dist_llm.planning.calibration import CALIBRATION, calibration_of
from dist_llm.planning.cluster import load_cluster
from dist_llm.planning.count import parameter_shapes
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.rank_traffic import rank_weights
from dist_llm.planning.shapes import ModelShape, from_config
from dist_llm.planning.software import Software
from dist_llm.planning.stage_split import bubble_seconds, stage_layers
from dist_llm.planning.step_time import StepTime, step_time
from dist_llm.topology.schedule import orders
from dist_llm.topology.simulate import simulate
from tests.timing import best_cpu_seconds

ROOT = Path(__file__).parents[2]
H100 = load_cluster("h100-80g")
LLAMA_70B = ModelShape(
    num_layers=80, d_model=8192, num_heads=64, num_kv_heads=8, head_dim=128, ffn_dim=28672, gated=True, vocab_size=128256,
    seq_len=8192, tied=False,
)  # fmt: skip
MIXTRAL = ModelShape(
    num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14336, gated=True, vocab_size=32000,
    seq_len=4096, tied=False, num_experts=8, experts_per_token=2,
)  # fmt: skip
SMALL_ENDS = replace(LLAMA_70B, vocab_size=2)  # so that all stages are equal but for a thousandth


def run(model: ModelShape = LLAMA_70B, software: Software | None = None, **sizes: object) -> StepTime:
    layout = LayoutShape(**sizes)  # type: ignore[arg-type]
    return step_time(model, layout, H100, software=software or Software(), scale=1.0)


def test_the_parts_add_up_to_the_whole() -> None:
    for sizes in (
        {"tp": 8, "dp": 8, "global_batch": 64},
        {"tp": 4, "pp": 4, "dp": 4, "global_batch": 64, "virtual_pp": 5, "recompute": "full"},
        {"dp": 64, "zero": 3, "global_batch": 128, "micro_batch": 2},
        {"tp": 2, "cp": 4, "dp": 8, "global_batch": 64},
    ):
        t = run(**sizes)
        parts = t.compute_s + t.tp_comm_s + t.cp_comm_s + t.ep_comm_s + t.pp_comm_s + t.dp_comm_s
        assert parts + t.bubble_s + t.optimizer_s + t.straggler_s == pytest.approx(t.total_s, rel=1e-12)


@pytest.mark.parametrize(("pp", "v", "num_micro"), [(4, 1, 16), (8, 1, 8), (8, 2, 16), (4, 5, 32)])
def test_equal_stages_have_the_published_bubble(pp: int, v: int, num_micro: int) -> None:
    # (p-1)/(v m) of the work, arXiv:2104.04473, section 2.2; the tiny ends leave 1 % between the stages.
    t = run(SMALL_ENDS, pp=pp, virtual_pp=v, global_batch=num_micro)
    assert t.bubble_s / t.compute_s == pytest.approx((pp - 1) / (v * num_micro), rel=0.01)


@pytest.mark.parametrize("heavy", [1.0, 1.3])
def test_the_closed_form_is_the_simulated_timeline(heavy: float) -> None:
    # Four stages, the last one slower: m times the slowest and once the others, within what the slow stage's neighbours wait.
    stages, num_micro = 4, 16

    def cost(stage: int, action: object) -> float:
        scale = heavy if stage == stages - 1 else 1.0
        return scale * (1.0 if action.kind == "F" else 2.0)  # type: ignore[attr-defined]

    simulated = simulate(orders("1f1b", stages, num_micro), cost).makespan
    slowest = 3.0 * max(1.0, heavy)
    assert num_micro * slowest + bubble_seconds(3.0, 3.0, 3.0 * heavy, stages) == pytest.approx(simulated, rel=1e-9)


def test_recomputing_everything_costs_a_third_more() -> None:
    # One forward more beside one forward and two backwards; the head is not recomputed.
    without, full = run(dp=8, zero=3, global_batch=8), run(dp=8, zero=3, global_batch=8, recompute="full")
    assert 1.25 < full.compute_s / without.compute_s < 1.34


def test_recomputing_attention_alone_costs_little() -> None:
    without, selective = run(tp=8, global_batch=8), run(tp=8, global_batch=8, recompute="selective")
    assert 1.0 < selective.compute_s / without.compute_s < 1.15


def test_one_rank_neither_communicates_nor_waits() -> None:
    t = run(zero=0)
    assert t.tp_comm_s == t.cp_comm_s == t.ep_comm_s == t.pp_comm_s == t.dp_comm_s == t.bubble_s == t.straggler_s == 0.0
    assert t.compute_s > 0


def test_tensor_parallelism_across_nodes_is_slower_than_inside() -> None:
    # Per micro-batch: 15/16 of the message instead of 7/8, and hops over the network; one port a rank nearly keeps up with NVLink.
    inside, across = run(tp=8, global_batch=8), run(tp=16, global_batch=8)
    assert across.tp_comm_s > 1.1 * inside.tp_comm_s
    one_port = replace(H100, network_bandwidth=H100.network_bandwidth / 8)
    layout = LayoutShape(tp=16, global_batch=8)
    assert step_time(LLAMA_70B, layout, one_port, scale=1.0).tp_comm_s > 5 * inside.tp_comm_s


def test_zero_3_gathers_in_every_micro_batch() -> None:
    nothing_hidden = Software(dp_overlap=0.0)
    one = run(software=nothing_hidden, dp=16, zero=3, global_batch=16)
    four = run(software=nothing_hidden, dp=16, zero=3, global_batch=64)
    assert four.dp_comm_s == pytest.approx(4 * one.dp_comm_s)
    once = run(software=nothing_hidden, dp=16, zero=1, global_batch=64)
    assert once.dp_comm_s < four.dp_comm_s / 4


def test_hybrid_sharding_keeps_the_gathers_inside_a_node() -> None:
    nothing_hidden = Software(dp_overlap=0.0)
    # 16 micro-batches: gathers over 512 ranks pay 64 network hops each time, the sum of the replicas comes once.
    whole = run(software=nothing_hidden, dp=512, zero=3, global_batch=8192)
    hybrid = run(software=nothing_hidden, dp=512, zero=3, global_batch=8192, shard_size=8)
    assert hybrid.dp_comm_s < 0.95 * whole.dp_comm_s


def test_overlap_hides_what_computation_covers() -> None:
    plain = run(software=Software(dp_overlap=0.0), dp=64, global_batch=256)
    hidden = run(software=Software(dp_overlap=1.0), dp=64, global_batch=256)
    assert hidden.dp_comm_s == pytest.approx(0.15 * plain.dp_comm_s, rel=1e-6)  # INTERFERENCE


def test_context_parallelism_divides_a_long_row() -> None:
    long = replace(LLAMA_70B, seq_len=131072)
    one, eight = run(long, tp=8, global_batch=1), run(long, tp=8, cp=8, global_batch=1)
    assert 6.5 < one.compute_s / eight.compute_s <= 8.01
    assert eight.cp_comm_s > 0


def test_windowed_layers_take_less_time_and_alternating_ones_half_as_much_less() -> None:
    long = replace(LLAMA_70B, seq_len=32768)
    layout = {"tp": 8, "dp": 1, "global_batch": 8}
    whole, every = run(long, **layout).compute_s, run(replace(long, window=1024), **layout).compute_s
    alternate = run(replace(long, window=1024, window_layers="alternate"), **layout).compute_s
    assert every < 0.8 * whole
    assert alternate == pytest.approx((whole + every) / 2, rel=1e-9)


def test_eight_bits_are_faster_but_not_twice() -> None:
    bf16, fp8 = run(tp=8, dp=1, global_batch=8), run(tp=8, dp=1, global_batch=8, precision="fp8")
    assert 1.3 < bf16.compute_s / fp8.compute_s < 2.0


def test_a_token_pays_for_the_experts_it_is_sent_to_only() -> None:
    dense = replace(MIXTRAL, num_experts=0, experts_per_token=0)
    one, two, four = (run(replace(MIXTRAL, experts_per_token=k), dp=8, ep=8, global_batch=8).compute_s for k in (1, 2, 4))
    plain = run(dense, dp=8, global_batch=8).compute_s
    assert plain < one < 1.15 * plain  # routing and moving rows
    assert one < two < four
    more = run(replace(MIXTRAL, num_experts=16), dp=8, ep=8, global_batch=8).compute_s
    assert more == pytest.approx(two, rel=0.01)


def test_experts_on_other_nodes_exchange_slowly() -> None:
    inside = run(MIXTRAL, dp=64, ep=8, global_batch=64)
    across = run(replace(MIXTRAL, num_experts=64), dp=64, ep=64, global_batch=64)
    assert across.ep_comm_s > 3 * inside.ep_comm_s


def test_rank_weights_of_one_rank_are_the_matrices_of_the_model() -> None:
    for name in ("llama", "gpt2", "packed"):
        config = load_config(ROOT / "configs" / "tiny" / f"{name}.yaml", ()).config
        shape = from_config(config.model, config.data.seq_len)
        matrices = [s for n, s in parameter_shapes(config.model).items() if len(s) == 2 and n != "positions.weight"]
        assert sum(rank_weights(shape, LayoutShape())) == sum(a * b for a, b in matrices)


def test_mixtral_has_its_public_number_of_weights() -> None:
    # 46,702,792,704 parameters of the public config, less 65 norms of 4096.
    assert sum(rank_weights(MIXTRAL, LayoutShape())) == 46_702_792_704 - 65 * 4096


@pytest.mark.parametrize(
    ("layers", "pp", "expected"),
    [(72, 12, (6, 6)), (70, 12, (6, 5)), (126, 16, (8, 7)), (78, 12, (7, 1)), (61, 4, (16, 13)), (7, 1, (7, 7)), (4, 8, (1, 0))],
)
def test_layers_are_cut_as_the_published_runs_cut_them(layers: int, pp: int, expected: tuple[int, int]) -> None:
    # BLOOM 72/12, 70/12 with the embeddings counted, 78/12 with one layer on the last stage; Llama 3 126/16.
    assert stage_layers(layers, pp) == expected


def test_calibration_scales_all_and_gives_the_interval() -> None:
    layout = LayoutShape(tp=8, dp=8, global_batch=64)
    plain, fitted = step_time(LLAMA_70B, layout, H100, scale=1.0), step_time(LLAMA_70B, layout, H100)
    hopper = CALIBRATION["hopper"]
    assert fitted.total_s == pytest.approx(hopper.scale * plain.total_s)
    assert fitted.low_s < fitted.total_s < fitted.high_s
    assert fitted.high_s / fitted.low_s == pytest.approx(2.718281828 ** (2 * hopper.spread))


def test_unknown_hardware_has_the_widest_interval() -> None:
    assert calibration_of("abacus").spread > max(c.spread for c in CALIBRATION.values())


def test_a_search_can_ask_thousands_of_times_a_second() -> None:
    layouts = [
        LayoutShape(tp=tp, pp=pp, dp=1024 // (tp * pp), zero=zero, micro_batch=mb, global_batch=1024, recompute=recompute)  # type: ignore[arg-type]
        for tp in (1, 2, 4, 8)
        for pp in (1, 2, 4, 8, 16)
        for zero in (0, 1, 2, 3)
        for mb in (1, 2, 4, 8)
        for recompute in ("none", "full")
    ]
    each = best_cpu_seconds(lambda: [step_time(LLAMA_70B, layout, H100) for layout in layouts]) / len(layouts)
    assert each < 500e-6  # 50 us on a quiet core


def test_planning_a_step_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, dist_llm.planning.step_time, dist_llm.planning.calibrate;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 7}, r"num_heads \(64\) must be a multiple of num_kv_heads \(7\)"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token must lie between 1 and num_experts"),
        ({"shared_experts": -1}, "shared_experts must not be negative"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LLAMA_70B, **change)


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="tp must be at least 1"):
        LayoutShape(tp=0)
    with pytest.raises(ValueError, match="zero must be"):
        LayoutShape(zero=4)
