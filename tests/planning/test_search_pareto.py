from __future__ import annotations

import itertools

from dist_llm.planning.brute import all_plans
from dist_llm.planning.cluster import load_cluster
from dist_llm.planning.growth import gpu_counts, over_counts, smallest_cluster
from dist_llm.planning.pareto import front, time_against_memory
from dist_llm.planning.search import Plan, Search
from dist_llm.planning.shapes import ModelShape

H100 = load_cluster("h100-80g")
MODEL = ModelShape(
    num_layers=12, d_model=1536, num_heads=12, num_kv_heads=4, head_dim=128, ffn_dim=4096, gated=True, vocab_size=32768,
    seq_len=2048, tied=False,
)  # fmt: skip


def costs(plan: Plan) -> tuple[float, float]:
    return plan.step.total_s, float(plan.memory.total)


def test_a_front_holds_what_nothing_beats_and_one_of_equals() -> None:
    points = [(1, 5), (2, 2), (2, 2), (3, 3), (5, 1), (1, 6)]
    assert front(points, lambda p: p) == [(1, 5), (2, 2), (5, 1)]


def test_time_against_memory_is_the_front_of_all_plans() -> None:
    every = all_plans(MODEL, 12, H100, 24)
    whole = time_against_memory(Search(MODEL, 12, H100, 24), step=0.0)
    assert [costs(p) for p in whole] == sorted({costs(p) for p in front(every, costs)})


def test_a_thinned_front_keeps_the_fastest_and_steps_down_in_memory() -> None:
    search = Search(MODEL, 8, H100, 32)
    whole, thinned = time_against_memory(search, step=0.0), time_against_memory(search, step=0.25)
    assert thinned[0] == whole[0] and len(thinned) < len(whole)
    assert {p.key for p in thinned} <= {p.key for p in whole}
    needs = [p.memory.total for p in thinned]
    assert all(b < 0.75 * a for a, b in itertools.pairwise(needs))


def test_counts_are_powers_of_two() -> None:
    assert gpu_counts(16) == [1, 2, 4, 8, 16] == gpu_counts(31)


def test_the_smallest_cluster_is_the_first_that_holds_the_model_and_the_first_in_time() -> None:
    limit, tokens = 6e9, 1e9
    plans = dict(over_counts(MODEL, H100, 64, limit_bytes=limit, most=64))
    fitting = [gpus for gpus, plan in plans.items() if plan is not None]
    assert fitting and fitting[0] > 1
    steps = -(-int(tokens) // (64 * 2048))
    second = plans[fitting[1]]
    assert second is not None
    found = smallest_cluster(MODEL, H100, 64, tokens, 1.001 * steps * second.step.total_s, limit_bytes=limit, most=64)
    assert found.fits is not None and found.in_time is not None
    assert (found.fits.layout.ranks, found.in_time.layout.ranks) == (fitting[0], fitting[1])
    never = smallest_cluster(MODEL, H100, 64, tokens, 1e-3, limit_bytes=limit, most=64)
    assert never.in_time is None and never.fastest is not None
    assert never.fastest.step.total_s == min(plan.step.total_s for plan in plans.values() if plan is not None)
