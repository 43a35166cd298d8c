from __future__ import annotations

from dataclasses import replace

import pytest

from dist_llm.planning.cluster import load_cluster
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.rank_traffic import OPTIMIZER_BYTES, optimizer_seconds, rank_weights, reduction_seconds, zero3_seconds
from dist_llm.planning.roofline import MEMORY_FRACTION
from dist_llm.planning.shapes import ModelShape
from dist_llm.planning.software import Software

# No latencies, so that times are bytes over rates.
H100 = replace(load_cluster("h100-80g"), nvlink_latency=0.0, network_latency=0.0)
RATE = H100.nvlink_bandwidth * H100.link_efficiency
MODEL = ModelShape(
    num_layers=12, d_model=4096, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14336, gated=True, vocab_size=32000,
    seq_len=4096, tied=False,
)  # fmt: skip
WEIGHTS = 12 * (2 * 4096 * 128 * 40 + 3 * 4096 * 14336) + 2 * 32000 * 4096
OPEN = Software(dp_overlap=0.0)  # nothing is hidden


def test_zero_3_moves_eight_bytes_a_weight_in_a_micro_batch() -> None:
    # Gathered twice in 16 bits, gradients scattered once in 32.
    seconds = zero3_seconds(MODEL, LayoutShape(dp=8, zero=3), OPEN, H100)
    assert seconds == pytest.approx((2 * 2 + 4) * WEIGHTS * 7 / 8 / RATE, rel=1e-9)


@pytest.mark.parametrize(("zero", "num_bytes"), [(0, 2 * 4), (1, 4 + 2), (2, 4 + 2)])
def test_gradients_and_weights_move_once_a_step(zero: int, num_bytes: int) -> None:
    seconds = reduction_seconds(MODEL, LayoutShape(dp=8, zero=zero), OPEN, H100, 1.0)  # type: ignore[arg-type]
    assert seconds == pytest.approx(num_bytes * WEIGHTS * 7 / 8 / RATE, rel=1e-9)


def test_hybrid_sharding_sums_a_shard_over_its_replicas() -> None:
    layout = LayoutShape(dp=32, zero=3, shard_size=8)
    port = H100.network_bandwidth * H100.network_efficiency
    seconds = reduction_seconds(MODEL, layout, OPEN, H100, 1.0)
    assert seconds == pytest.approx(2 * 4 * WEIGHTS / 8 * 3 / 4 / port, rel=1e-9)


def test_tensor_and_pipeline_ranks_hold_their_part() -> None:
    dense, experts = rank_weights(MODEL, LayoutShape(tp=4, pp=3))
    assert experts == 0
    assert dense == (4 * (2 * 4096 * 128 * 40 + 3 * 4096 * 14336) + 32000 * 4096) / 4


def test_experts_are_divided_over_their_own_ranks() -> None:
    moe = replace(MODEL, num_experts=16, experts_per_token=2)
    _, experts = rank_weights(moe, LayoutShape(dp=8, ep=8))
    assert experts == 12 * 16 * 3 * 4096 * 14336 / 8
    _, whole = rank_weights(moe, LayoutShape(dp=8))
    assert whole == 8 * experts


def test_the_optimiser_is_divided_from_zero_1_on() -> None:
    whole = optimizer_seconds(MODEL, LayoutShape(dp=8, zero=0), H100)
    assert whole == pytest.approx(OPTIMIZER_BYTES * WEIGHTS / (H100.memory_bandwidth * MEMORY_FRACTION))
    assert optimizer_seconds(MODEL, LayoutShape(dp=8, zero=1), H100) == pytest.approx(whole / 8)
