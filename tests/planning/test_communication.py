"""The formulas against real steps: every group, collective, call and byte, on every rank."""

from __future__ import annotations

import time

import pytest

from dist_llm.parallel.ranks import run_on_ranks
from dist_llm.planning.communication import DeepSpeedSettings, step_traffic
from dist_llm.planning.wire import Counts, summarize
from dist_llm.topology.grid import RankGrid

from .ledger_steps import Case, count_steps, tiny_config

# Large enough to stay divided at ZeRO-3: 2048 x 64 is above DeepSpeed's threshold of 100 000 elements.
LARGE = "model.vocab_size=2048"
# Settings that make buckets overflow and parameters leave and come back, as only models above 10^9 parameters do with the defaults.
TIGHT = {
    "reduce_bucket_size": 30_000,
    "sub_group_size": 20_000,
    "stage3_param_persistence_threshold": 1_000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 10_000,
}
NAMES = {
    "reduce_bucket_size": "reduce_bucket_size",
    "sub_group_size": "sub_group_size",
    "stage3_param_persistence_threshold": "param_persistence_threshold",
    "stage3_max_reuse_distance": "max_reuse_distance",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
}


def hold(sizes: dict[str, int], cases: list[Case]) -> None:
    """Formula and ledger agree on every case and rank, and two steps in a row send the same."""
    axes = [f"parallel.{axis}={size}" for axis, size in sizes.items() if axis != "dp"]
    by_heads: dict[int, list[Case]] = {}  # the groups of a launch depend on them
    for case in cases:
        whole = Case(case.tiny, [*axes, *case.overrides], case.settings)
        by_heads.setdefault(tiny_config(whole.tiny, whole.overrides).model.kv_heads if "tp" in sizes else 0, []).append(whole)
    for kv_heads, together in by_heads.items():
        answers = run_on_ranks(count_steps, **sizes, kv_heads=kv_heads or None, args=(together,))  # type: ignore[arg-type]
        for rank in range(len(answers)):
            for case, measured in zip(together, answers[rank], strict=True):
                planned = step_traffic(
                    tiny_config(case.tiny, case.overrides),
                    RankGrid(sizes),
                    rank,
                    DeepSpeedSettings(**{NAMES[key]: value for key, value in case.settings.items()}),
                )
                assert measured[-1] == measured[-2], f"rank {rank} of {case} is not steady"
                assert summarize(planned) == summarize(measured[-1]), f"rank {rank} of {case}"
                assert planned == measured[-1]


def zero(stage: int, *more: str, batch: int = 4, tiny: str = "llama", settings: dict[str, int] | None = None) -> Case:
    return Case(tiny, [f"parallel.zero={stage}", f"train.batch_size={batch}", *more], settings or {})


def test_zero_stages_on_three_ranks_at_several_accumulation_counts() -> None:
    # Three ranks divide neither the parameters nor the buffers: all padding shows.
    cases = [zero(stage, batch=batch) for stage, batch in ((0, 12), (1, 18), (2, 6), (2, 18), (3, 6), (3, 18))]
    cases += [zero(stage, "precision=bf16", tiny="gpt2", batch=12) for stage in (0, 1, 2)]
    cases += [zero(3, LARGE, "precision=bf16", tiny="gpt2", batch=12), zero(3, LARGE, "parallel.recompute=full", batch=12)]
    hold({"dp": 3}, cases)


def test_deepspeed_settings_on_two_ranks() -> None:
    cases = [zero(stage, tiny=tiny, settings={"reduce_bucket_size": 30_000}) for stage, tiny in ((1, "llama"), (2, "llama"), (2, "gpt2"))]
    cases += [zero(3, settings=TIGHT), zero(3, tiny="gpt2", batch=8, settings=TIGHT)]
    cases += [zero(3, settings=TIGHT | {"stage3_max_reuse_distance": 90_000, "stage3_max_live_parameters": 50_000})]
    hold({"dp": 2}, cases)


def test_offload_on_two_ranks() -> None:
    optimizer, parameters = "parallel.offload_optimizer=cpu", "parallel.offload_parameters=cpu"
    bf16 = "precision=bf16"
    hold(
        {"dp": 2},
        [zero(1, optimizer, bf16, tiny="gpt2"), zero(2, optimizer, bf16), zero(3, optimizer), zero(3, LARGE, optimizer, parameters)],
    )


def test_tensor_parallelism_on_two_ranks() -> None:
    cases = [
        zero(0),
        zero(0, "parallel.sequence_parallel=true"),
        zero(1, "parallel.sequence_parallel=true", tiny="gpt2"),
        zero(2, "parallel.recompute=full", tiny="gpt2"),
        zero(3, "parallel.sequence_parallel=true", "parallel.recompute=full"),
        zero(0, "parallel.recompute=full", "model.dropout=0.1", "precision=bf16"),
        zero(2, "model.vocab_size=511", "precision=bf16"),
    ]
    hold({"tp": 2}, cases)


def test_more_tensor_parallel_ranks_than_key_value_heads() -> None:
    sequence = "parallel.sequence_parallel=true"
    some = zero(1, sequence, "precision=bf16", "parallel.recompute=full", "parallel.recompute_layers=1")
    hold({"tp": 4}, [zero(0), some, zero(0, "model.num_kv_heads=1")])


def test_context_parallelism_on_two_ranks() -> None:
    exchange = "parallel.cp_kind=all_to_all"
    cases = [
        zero(0),
        zero(1, "parallel.recompute=selective", tiny="packed"),
        zero(1, "parallel.recompute=full", "precision=bf16", tiny="packed"),
        zero(2, exchange, "parallel.recompute=full", tiny="packed"),
        zero(2, exchange, "parallel.recompute=selective", "precision=bf16", tiny="packed"),
        zero(3, exchange),
        zero(1, exchange, "model.num_kv_heads=1"),
    ]
    hold({"cp": 2}, cases)


def test_pipelines() -> None:
    bf16 = "precision=bf16"
    hold({"pp": 2}, [zero(0, batch=6), zero(1, tiny="gpt2"), zero(1, bf16, tiny="gpt2")])
    interleaved = ["model.num_layers=4", "parallel.schedule=interleaved", "parallel.chunks=2", "train.batch_size=8", "parallel.zero=1"]
    hold({"pp": 2}, [Case("llama", interleaved)])


def test_axes_together() -> None:
    sequence = "parallel.sequence_parallel=true"
    hold({"tp": 2, "pp": 2}, [zero(1, tiny="gpt2"), zero(0, sequence), zero(1, sequence, "precision=bf16", tiny="gpt2")])
    hold({"tp": 2, "cp": 2}, [zero(2, sequence, tiny="packed"), zero(3, "parallel.cp_kind=all_to_all")])
    hold({"dp": 2, "pp": 2}, [zero(1, "precision=bf16", tiny="gpt2")])


def total(counts: Counts, group: str) -> int:
    return sum(value.payload_bytes for (name, _), value in counts.items() if name == group)


def test_sequence_parallelism_moves_the_bytes_of_the_all_reduces_it_replaces() -> None:
    grid = RankGrid({"tp": 4, "dp": 2})
    config = tiny_config("llama", ["parallel.tp=4", "parallel.zero=1"])
    plain = step_traffic(config, grid, 0)
    sequence = step_traffic(tiny_config("llama", ["parallel.tp=4", "parallel.zero=1", "parallel.sequence_parallel=true"]), grid, 0)
    halves = sequence["tp", "all_gather"].wire_bytes + sequence["tp", "reduce_scatter"].wire_bytes
    # Beside them remain the cross-entropy and, under sequence parallelism, the gradients of the norms.
    norms = (2 * 2 + 1) * 64 * 4
    micro_batches = 2
    extra = sequence["tp", "all_reduce"].payload_bytes - micro_batches * norms
    assert halves == (plain["tp", "all_reduce"].payload_bytes - extra) * 2 * 3 / 4


def test_one_rank_sends_nothing() -> None:
    for stage in range(4):
        assert step_traffic(tiny_config("llama", [f"parallel.zero={stage}"]), RankGrid({}), 0) == {}


def test_sixteen_thousand_ranks_are_answered_in_milliseconds() -> None:
    grid = RankGrid({"tp": 8, "dp": 256, "pp": 8})
    model = ["model.num_layers=96", "model.d_model=12288", "model.num_heads=96", "model.num_kv_heads=96", "model.ffn_dim=49152"]
    config = tiny_config(
        "llama", [*model, "parallel.tp=8", "parallel.pp=8", "train.batch_size=4096", "train.micro_batch_size=1", "precision=bf16"]
    )
    start = time.perf_counter()
    counts = step_traffic(config, grid, grid.size - 1)
    assert time.perf_counter() - start < 0.5  # a few milliseconds; the rest is for a busy machine
    assert total(counts, "tp") > 0
    assert total(counts, "pp") > 0


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.batch_size \(8\) must be divisible by micro_batch_size x dp = 6"):
        step_traffic(tiny_config("llama", []), RankGrid({"dp": 3}), 0)
