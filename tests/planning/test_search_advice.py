from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from dist_llm.planning.advice import advise, batch_rows, learning_rate, model_ladder, worth_params
from dist_llm.planning.amounts import Fleet, device_cluster, parse_amount, parse_bytes, parse_experts, parse_fleet, whole_nodes
from dist_llm.planning.cluster import cluster_names, load_cluster
from dist_llm.planning.count_shapes import shape_params
from dist_llm.planning.laws import HOFFMANN, REPLICATION
from dist_llm.planning.question import about_model, about_time, nearest_shape
from dist_llm.utils.errors import ConfigError

LADDER = model_ladder(32768, 4096)


@pytest.mark.parametrize("flops", [1e17, 1e18, 1e20, 1e22, 5.76e23, 1e25])
def test_the_advised_model_loses_hardly_more_than_the_laws_optimum(flops: float) -> None:
    # Steps of the ladder are at most a factor of 1.5, and the loss is flat: 0.002 nat at most.
    advice = advise(flops, LADDER)
    assert advice.best.loss <= advice.loss <= advice.best.loss + 0.002
    assert advice.tokens * 6 * advice.count.active == pytest.approx(flops)
    low, high = advice.tolerated
    assert low < advice.best.params < high
    for edge in (low, high):
        assert REPLICATION.loss(edge, flops / 6 / edge) == pytest.approx(advice.best.loss + 0.01, abs=1e-6)


def test_no_other_rung_would_lose_less() -> None:
    advice = advise(1e21, LADDER, HOFFMANN)
    for shape in LADDER:
        params = shape_params(shape).total
        assert HOFFMANN.loss(params, 1e21 / 6 / params) >= advice.loss


def test_rungs_go_up_in_small_steps_and_divide_well() -> None:
    sizes = [shape_params(shape).total for shape in LADDER]
    assert sizes[0] < 5e6 and sizes[-1] > 4e12
    assert all(b / a < 1.7 for a, b in itertools.pairwise(sizes) if a > 5e6)  # below, the tables are most of a model
    for shape in LADDER:
        assert shape.num_heads % 2 == 0 and shape.num_layers % 2 == 0
        assert shape.d_model < 4096 or (shape.num_heads % 8 == 0 and shape.num_layers % 8 == 0 and shape.ffn_dim % 8 == 0)


def test_too_few_flops_are_refused_and_not_rounded_up() -> None:
    with pytest.raises(ConfigError, match="less than the smallest"):
        advise(1e12, LADDER)
    with pytest.raises(ConfigError, match="more than the largest"):
        advise(1e30, LADDER)


def test_experts_are_worth_more_than_the_active_and_less_than_all_parameters() -> None:
    shape = next(s for s in model_ladder(32768, 4096, experts=8, active=2) if s.d_model == 2048)
    count = shape_params(shape)
    assert count.active < worth_params(shape, count) < count.total
    dense = replace(shape, num_experts=0, experts_per_token=0)
    assert worth_params(dense, shape_params(dense)) == shape_params(dense).total


def test_for_equal_flops_experts_lose_less_than_a_dense_model() -> None:
    assert advise(1e21, model_ladder(32768, 4096, experts=8, active=2)).loss < advise(1e21, LADDER).loss


def test_batch_and_rate_are_those_of_the_published_run_they_were_fitted_for() -> None:
    # DeepSeek LLM 7B: 2T tokens, 2304 rows of 4096 and a rate of 4.2e-4 (arXiv:2401.02954, table 2); C is 2048 x 4096-token rows off by
    # the rounding to a power of two times the devices.
    flops = 6 * 6.9e9 * 2e12
    assert batch_rows(flops, 4096, 64) == 2048
    assert learning_rate(flops) == pytest.approx(4.2e-4, rel=0.03)


@pytest.mark.parametrize("gpus", [1, 8, 24, 96, 1000, 16384])
def test_a_batch_is_gpus_times_a_power_of_two_where_that_is_whole(gpus: int) -> None:
    for flops in (1e18, 1e21, 1e24):
        rows = batch_rows(flops, 4096, gpus)
        ratio = math.log2(rows / gpus)
        assert rows >= 1 and ratio == int(ratio)


def test_the_time_buys_as_many_flops_as_it_is_asked_for() -> None:
    fleet = parse_fleet("8xH100-80G")
    question, search = about_time(fleet, 86400.0, LADDER, REPLICATION, batch_size=None, precision="bf16")
    best = search.best(1)[0]
    steps = question.tokens / (question.batch_size * question.model.seq_len)
    assert steps == int(steps)
    assert steps * best.step.total_s <= 86400 < (steps + 1) * best.step.total_s
    # The model is the law's choice for what the time really buys, give or take a rung.
    assert abs(LADDER.index(advise(question.flops, LADDER).model) - LADDER.index(question.model)) <= 1


def test_a_model_too_large_for_the_memory_makes_way_for_one_that_fits() -> None:
    fleet = parse_fleet("1xH100-80G")
    roomy, _ = about_time(fleet, 86400.0 * 300, LADDER, REPLICATION, batch_size=64, precision="bf16")
    tight, search = about_time(fleet, 86400.0 * 300, LADDER, REPLICATION, batch_size=64, precision="bf16", limit_bytes=12e9)
    assert tight.count.total < roomy.count.total and search.best(1)[0].memory.total <= 12e9


def test_without_tokens_a_given_model_gets_its_compute_optimal_number() -> None:
    model = nearest_shape(7e9, LADDER)
    question = about_model(model, HOFFMANN, tokens=None, gpus=8, batch_size=None, precision="bf16", seconds=None)
    assert HOFFMANN.optimal(question.flops).params == pytest.approx(question.count.total, rel=1e-6)
    assert not question.tokens_said


@pytest.mark.parametrize(
    ("text", "value"),
    [("300B", 3e11), ("1e22", 1e22), ("1.5T", 1.5e12), ("7b", 7e9), ("14", 14.0), ("2.", 2.0), (".5", 0.5), ("1_000", 1e3)],
)
def test_amounts_are_read_with_their_multiples(text: str, value: float) -> None:
    assert parse_amount(text, "--x", example="1") == pytest.approx(value)


@pytest.mark.parametrize("text", ["-3", "0", "abc", "", "1e999", "3 GB", "1B2", "nan", "inf", "--"])
def test_bad_amounts_name_option_value_and_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--tokens .*300B"):
        parse_amount(text, "--tokens", unit="tokens", example="300B")


def test_devices_are_found_by_file_device_and_unambiguous_family() -> None:
    for text in ("64xH100-80G", "64 x h100-80g", "64*H100-80g"):
        if " " not in text:
            assert parse_fleet(text) == Fleet(64, load_cluster("h100-80g"))
    assert parse_fleet("2xV100").cluster.name == "v100-32g"
    assert all(device_cluster(name, "").name == name for name in cluster_names())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("64xH10O", "did you mean H100"),
        ("64xH100-8OG", "did you mean H100-80G"),
        ("64xA10", "did you mean A100"),
        ("64xB20", "did you mean B200"),
        ("64xH100", "h100-80g or h100-96g-500w"),
        ("64", "64xH100-80G"),
        ("x", "64xH100-80G"),
        ("0xH200", "between 1 and"),
        ("64xTPU", "no device is called TPU"),
        ("64xnowhere.yaml", "nowhere.yaml"),
    ],
)
def test_a_device_that_is_not_there_is_answered_with_the_nearest(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fleet(text)
    assert words in str(caught.value)


def test_devices_fill_nodes() -> None:
    whole_nodes(parse_fleet("4xH100-80G"), "")
    whole_nodes(parse_fleet("64xGB200"), "")
    assert parse_fleet("64xGB200").nodes == 16  # trays of four
    with pytest.raises(ConfigError, match="56 or 64"):
        whole_nodes(parse_fleet("60xH100-80G"), "--gpus 60xH100-80G")


def test_memory_and_experts_are_checked() -> None:
    assert parse_bytes("16G", "--gpu-memory") == parse_bytes("16", "") == parse_bytes("16 GB", "") == 16e9
    assert parse_experts("8x2") == (8, 2)
    for text in ("8", "2x8", "1x1", "8x0", "axb"):
        with pytest.raises(ConfigError, match=r"--moe .*8x2"):
            parse_experts(text)
    with pytest.raises(ConfigError, match="--gpu-memory 0"):
        parse_bytes("0", "--gpu-memory")
