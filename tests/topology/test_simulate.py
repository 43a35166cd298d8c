from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.topology.schedule import SCHEDULES, Action, bubble_fraction, orders
from dist_llm.topology.simulate import Timeline, simulate
from tests.timing import best_cpu_seconds

COSTS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
stages, micros = st.integers(1, 9), st.integers(1, 20)

# Whole numbers add up exactly; only the fraction at the end is rounded.
ROUNDING = 1e-12


def equal_cost(stage: int, action: Action) -> float:
    del stage
    return COSTS[action.kind]


def check_dependencies(timeline: Timeline, num_chunks: int, transfer: float) -> None:
    """Every start is exactly the latest end of what the action needs: nothing early, nothing idle without reason."""
    p = len(timeline.orders)
    last = p * num_chunks - 1
    end = {
        (action.kind.replace("I", "B"), action.chunk * p + stage, action.micro): timeline.ends[stage][i]
        for stage, order in enumerate(timeline.orders)
        for i, action in enumerate(order)
    }
    for stage, order in enumerate(timeline.orders):
        before = 0.0
        for i, action in enumerate(order):
            virtual, needs = action.chunk * p + stage, [before]
            if action.kind == "F" and virtual > 0:
                needs.append(end["F", virtual - 1, action.micro] + transfer)
            if action.kind in "BI":
                needs.append(end["F", virtual, action.micro])
                if virtual < last:
                    needs.append(end["B", virtual + 1, action.micro] + transfer)
            if action.kind == "W":
                needs.append(end["B", virtual, action.micro])
            assert timeline.starts[stage][i] == max(needs)
            before = timeline.ends[stage][i]


@settings(deadline=None)  # the machine may be busy
@given(stages, micros, st.integers(2, 4), st.sampled_from(SCHEDULES), st.integers(0, 3), st.data())
def test_every_schedule_runs_to_its_end_and_waits_for_what_it_needs_only(
    p: int, m: int, v: int, name: str, transfer: int, data: st.DataObject
) -> None:
    num_chunks = v if name == "interleaved" else 1
    m = p * min(m, 4) if name == "interleaved" else m
    speed = data.draw(st.lists(st.integers(0, 5), min_size=p, max_size=p))
    hop = float(transfer) if p > 1 else 0.0
    timeline = simulate(orders(name, p, m, num_chunks), lambda s, a: speed[s] * COSTS[a.kind], transfer=transfer)
    check_dependencies(timeline, num_chunks, hop)
    assert timeline.busy == [speed[stage] * 3.0 * m * num_chunks for stage in range(p)]


@settings(deadline=None)  # the machine may be busy
@given(stages, micros)
def test_1f1b_with_equal_stages_has_the_bubble_of_theory(p: int, m: int) -> None:
    timeline = simulate(orders("1f1b", p, m), equal_cost)
    assert timeline.makespan == 3 * (m + p - 1)
    assert timeline.bubble == pytest.approx(bubble_fraction(p, m), abs=ROUNDING)


@settings(deadline=None)  # the machine may be busy
@given(stages, st.integers(1, 4), st.integers(2, 4))
def test_interleaved_with_equal_stages_has_the_bubble_of_theory(p: int, rounds: int, v: int) -> None:
    m = p * rounds
    timeline = simulate(orders("interleaved", p, m, v), equal_cost)
    assert timeline.makespan == 3 * (v * m + p - 1)
    assert timeline.bubble == pytest.approx(bubble_fraction(p, m, v), abs=ROUNDING)


@settings(deadline=None)  # the machine may be busy
@given(stages, st.integers(0, 12))
def test_zero_bubble_with_equal_thirds_leaves_a_third_of_the_bubble(p: int, more: int) -> None:
    m = p + more
    timeline = simulate(orders("zero_bubble", p, m), equal_cost)
    assert timeline.makespan == 3 * m + p - 1


@settings(deadline=None)  # the machine may be busy
@given(stages, micros)
def test_zero_bubble_is_never_slower_than_1f1b(p: int, m: int) -> None:
    assert simulate(orders("zero_bubble", p, m), equal_cost).makespan <= simulate(orders("1f1b", p, m), equal_cost).makespan


def test_a_transfer_delays_each_hop_of_the_way_there_and_back() -> None:
    # One micro-batch over 3 stages: 3 forwards, 3 backwards, 2 hops each way.
    assert simulate(orders("1f1b", 3, 1), equal_cost, transfer=0.5).makespan == 3 * 3 + 4 * 0.5
    assert simulate(orders("interleaved", 1, 2, 2), equal_cost, transfer=0.5).makespan == 3 * 2 * 2


def test_the_slowest_stage_sets_the_pace() -> None:
    timeline = simulate(orders("1f1b", 2, 100), lambda stage, action: COSTS[action.kind] * (2 if stage == 1 else 1))
    assert timeline.makespan == 1 + 100 * 6 + 2


def test_64_stages_of_512_micro_batches_take_a_fraction_of_a_second() -> None:
    timeline = simulate(orders("1f1b", 64, 512), equal_cost)
    assert best_cpu_seconds(lambda: simulate(orders("1f1b", 64, 512), equal_cost)) < 0.3  # 0.05 s where nothing else runs
    assert timeline.bubble == pytest.approx(bubble_fraction(64, 512), abs=ROUNDING)


def test_a_step_that_takes_no_time_has_no_bubble() -> None:
    assert simulate(orders("1f1b", 2, 2), lambda stage, action: 0.0).bubble == 0.0


F0, F1, B0, B1 = Action("F", 0), Action("F", 1), Action("B", 0), Action("B", 1)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([[F0, B0, F1, B1], [F1, B1, F0, B0]], "wait for one another for ever: stage 0 at B0, stage 1 at F1"),
        ([[B0, F0], [F0, B0]], "stage 0 at B0, stage 1 at F0"),
        ([[F0, B0], [B0, F0]], "stage 0 at B0, stage 1 at B0"),
        ([[F0, B0], [F0]], "stage 0 at B0$"),
        ([[Action("F", 0), Action("W", 0), Action("I", 0)]], "stage 0 at W0"),
        ([[F0, F0, B0]], "stage 0 has F0 twice"),
    ],
)
def test_orders_that_can_never_end_are_found_out(broken: list[list[Action]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(broken, equal_cost)


def test_time_does_not_run_backwards() -> None:
    with pytest.raises(ValueError, match=r"stage 0's F0 cannot take -1\.0"):
        simulate(orders("1f1b", 2, 2), lambda stage, action: -1.0)
    with pytest.raises(ValueError, match=r"cannot take -0\.5"):
        simulate(orders("1f1b", 2, 2), equal_cost, transfer=-0.5)
