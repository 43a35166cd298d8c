from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.topology.schedule import SCHEDULES, Action, bubble_fraction, interleaved, one_f_one_b, orders, peak_in_flight, zero_bubble

stages, micros = st.integers(1, 9), st.integers(1, 20)


def order_text(order: list[Action]) -> str:
    return " ".join(map(str, order))


def test_orders_by_hand() -> None:
    assert order_text(one_f_one_b(3, 4, 0)) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert order_text(one_f_one_b(3, 4, 2)) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert order_text(one_f_one_b(4, 1, 0)) == "F0 B0"
    assert order_text(interleaved(2, 2, 2, 0)) == "F0 F1 F0.1 F1.1 B0.1 B1.1 B0 B1"
    assert order_text(interleaved(2, 2, 2, 1)) == "F0 F1 F0.1 B0.1 F1.1 B1.1 B0 B1"
    assert order_text(interleaved(2, 4, 2, 0)) == "F0 F1 F0.1 F1.1 F2 B0.1 F3 B1.1 F2.1 B0 F3.1 B1 B2.1 B3.1 B2 B3"
    assert order_text(zero_bubble(2, 3, 1)) == "F0 I0 F1 I1 W0 F2 I2 W1 W2"
    assert order_text(zero_bubble(2, 3, 0)) == "F0 F1 I0 W0 F2 I1 W1 I2 W2"


@settings(deadline=None)  # the machine may be busy
@given(stages, micros, st.integers(2, 4), st.sampled_from(SCHEDULES))
def test_each_stage_does_everything_once_and_forward_first(p: int, m: int, v: int, name: str) -> None:
    num_chunks = v if name == "interleaved" else 1
    m = m * p if name == "interleaved" else m
    kinds = "FIW" if name == "zero_bubble" else "FB"
    for order in orders(name, p, m, num_chunks):
        at = {action: position for position, action in enumerate(order)}
        assert len(order) == len(at) == len(kinds) * m * num_chunks
        for micro in range(m):
            for chunk in range(num_chunks):
                positions = [at[Action(kind, micro, chunk)] for kind in kinds]  # type: ignore[arg-type]
                assert positions == sorted(positions)


@settings(deadline=None)  # the machine may be busy
@given(stages, micros)
def test_1f1b_holds_no_more_micro_batches_than_stages_to_go(p: int, m: int) -> None:
    assert [peak_in_flight(order) for order in orders("1f1b", p, m)] == [min(m, p - stage) for stage in range(p)]


@settings(deadline=None)  # the machine may be busy
@given(stages, st.integers(1, 4), st.integers(2, 4))
def test_interleaved_holds_its_warm_up_and_one_more(p: int, rounds: int, v: int) -> None:
    warmup = [2 * (p - 1 - stage) + (v - 1) * p for stage in range(p)]
    assert [peak_in_flight(order) for order in orders("interleaved", p, p * rounds, v)] == [min(w + 1, v * p * rounds) for w in warmup]


@settings(deadline=None)  # the machine may be busy
@given(stages, micros)
def test_zero_bubble_holds_no_more_than_the_first_stage_of_1f1b(p: int, m: int) -> None:
    assert [peak_in_flight(order) for order in orders("zero_bubble", p, m)] == [min(m, p)] * p


def test_bubble_by_hand() -> None:
    assert bubble_fraction(4, 8) == 3 / 11
    assert bubble_fraction(4, 8, 2) == 3 / 19
    assert bubble_fraction(1, 8) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1b", 2, 0), "at least 1 micro-batch, got 0"),
        (("interleaved", 4, 6, 2), "6 micro-batches are not divisible by 4 stages"),
        (("interleaved", 4, 8, 1), "at least 2 chunks a stage, got 1; with one chunk use 1f1b"),
        (("1f1b", 4, 8, 2), "schedule 1f1b has one chunk a stage, got 2"),
        (("gpipe", 4, 8), "no pipeline schedule gpipe; there are 1f1b, interleaved, zero_bubble"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_with_both_numbers(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orders(*arguments)


def test_a_stage_outside_the_pipeline_is_refused() -> None:
    with pytest.raises(ValueError, match="stage 4 is outside a pipeline of 4 stages"):
        one_f_one_b(4, 8, 4)
