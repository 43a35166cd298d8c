from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.planning.budget import TOKENS_PER_PARAMETER, SpeedPoint, choose_size, ladder, seconds_per_token
from dist_llm.planning.count import count_params, flops_per_token
from dist_llm.utils.errors import ConfigError, ExitCode

VOCAB, SEQ_LEN, BATCH = 2048, 256, 16


def point(flops: float, tokens_per_s: float) -> SpeedPoint:
    return SpeedPoint(d_model=0, num_layers=0, flops_per_token=flops, tokens_per_s=tokens_per_s)


# What a small machine does: small models at the speed of their ops, large ones at that of their arithmetic.
POINTS = [point(2e5, 90_000.0), point(1e6, 60_000.0), point(8e6, 12_000.0)]


def choose(budget_s: float, points: list[SpeedPoint] | None = None):
    return choose_size(POINTS if points is None else points, budget_s=budget_s, vocab_size=VOCAB, seq_len=SEQ_LEN, batch_size=BATCH)


def test_the_ladder_climbs_in_parameters_and_builds_valid_models() -> None:
    sizes = [count_params(model).total for model in ladder(VOCAB, SEQ_LEN)]
    assert all(a < b for a, b in itertools.pairwise(sizes))
    assert sizes[0] < 100_000
    assert sizes[-1] > 1e9
    for model in ladder(VOCAB, SEQ_LEN):
        assert (model.vocab_size, model.max_seq_len) == (VOCAB, SEQ_LEN)
        assert model.d_model % model.num_heads == 0
        assert model.num_heads * model.head_size == model.d_model and model.head_size % 2 == 0 and 16 <= model.head_size <= 64


def test_each_choice_has_twenty_tokens_a_parameter() -> None:
    seen = set()
    for model in ladder(VOCAB, SEQ_LEN):
        # A budget in which this model just fits.
        tokens = round(TOKENS_PER_PARAMETER * count_params(model).total / (BATCH * SEQ_LEN)) * BATCH * SEQ_LEN
        choice = choose(1.0001 * tokens * seconds_per_token(POINTS, flops_per_token(model, SEQ_LEN)))
        seen.add(choice.params)
        assert choice.params == count_params(choice.model).total >= count_params(model).total
        assert choice.tokens == choice.steps * BATCH * SEQ_LEN
        if choice.steps >= 10:
            assert choice.tokens / choice.params == pytest.approx(20, rel=0.1)
    assert len(seen) > 20


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(30, 1e7), min_size=2, max_size=8))
def test_more_time_never_buys_a_smaller_model_and_none_takes_more_than_its_budget(budgets: list[float]) -> None:
    choices = [choose(budget) for budget in sorted(budgets)]
    assert all(a.params <= b.params for a, b in itertools.pairwise(choices))
    assert all(choice.expected_s <= budget for choice, budget in zip(choices, sorted(budgets), strict=True))


def test_a_budget_too_short_is_refused_with_what_would_do() -> None:
    with pytest.raises(
        ConfigError, match=r"no model of the ladder trains in 0.001 s here; the smallest needs (\d+) s: give more time"
    ) as caught:
        choose(0.001)
    assert caught.value.exit_code == ExitCode.USAGE
    needed = float(re.search(r"needs (\d+) s", str(caught.value))[1])
    with pytest.raises(ConfigError):
        choose(needed - 1)
    assert choose(needed).params == count_params(ladder(VOCAB, SEQ_LEN)[0]).total


def test_the_reason_says_what_counts_and_that_it_is_an_extrapolation() -> None:
    choice = choose(120.0)
    assert f"{choice.params:,} parameters (all of them, embedding included) x 20" in choice.reason
    assert f"{choice.steps:,} steps of 4,096" in choice.reason
    assert f"expected {choice.expected_s:.0f} s of the 120 s budget" in choice.reason
    assert "at this size it is an extrapolation" in choice.reason


def test_the_reason_names_no_extrapolation_where_there_is_none() -> None:
    choice = choose(1e6, [point(1e9, 1e6)])
    assert 70e6 <= choice.params <= 16e9
    assert "extrapolation" not in choice.reason
    assert "this size lies between them" in choice.reason


def test_the_time_of_a_token_passes_through_the_measured_points_in_any_order() -> None:
    for order in itertools.permutations(POINTS):
        for measured in POINTS:
            assert seconds_per_token(order, measured.flops_per_token) == pytest.approx(1 / measured.tokens_per_s, rel=1e-12)


def test_beyond_the_measured_models_time_grows_with_flops_and_below_them_it_stays() -> None:
    assert seconds_per_token(POINTS, 8e7) == pytest.approx(10 / 12_000)
    assert seconds_per_token(POINTS, 1.0) == 1 / 90_000
    assert seconds_per_token([point(1e6, 50.0)], 2e6) == pytest.approx(2 / 50)


def test_two_measurements_of_one_size_do_no_harm() -> None:
    twice = [point(1e5, 10.0), point(1e6, 4.0), point(1e6, 5.0), point(1e7, 1.0)]
    for flops in (1e5, 5e5, 1e6, 2e6, 1e7, 1e8):
        assert 0.1 <= seconds_per_token(twice, flops) <= 10


def test_no_measurement_is_refused() -> None:
    with pytest.raises(ValueError, match="no measured speeds"):
        seconds_per_token([], 1e6)


@given(
    st.lists(st.tuples(st.floats(1e3, 1e12), st.floats(1e-3, 1e7)), min_size=1, max_size=6, unique_by=lambda p: p[0]),
    st.lists(st.floats(1e2, 1e13), min_size=2, max_size=10),
)
def test_a_larger_model_is_never_faster_when_none_was_measured_so(raw: list[tuple[float, float]], queries: list[float]) -> None:
    flops = sorted(f for f, _ in raw)
    speeds = sorted((s for _, s in raw), reverse=True)
    points = [point(f, s) for f, s in zip(flops, speeds, strict=True)]
    times = [seconds_per_token(points, q) for q in sorted(queries)]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(times))
