from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.topology.stages import cut_stages
from tests.timing import best_cpu_seconds


def largest(cut: tuple[range, ...], costs: list[float], first: float, last: float) -> Fraction:
    """Exact cost of the slowest stage."""
    sums = [sum((Fraction(costs[layer]) for layer in stage), Fraction(0)) for stage in cut]
    sums[0] += Fraction(first)
    sums[-1] += Fraction(last)
    return max(sums)


def every_cut(num_layers: int, num_stages: int) -> list[tuple[range, ...]]:
    cuts = itertools.combinations(range(1, num_layers), num_stages - 1)
    return [tuple(range(a, b) for a, b in itertools.pairwise((0, *inner, num_layers))) for inner in cuts]


cost = st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e6, allow_nan=False), st.sampled_from([0.1, 0.2, 0.3, 1e22]))


@settings(deadline=None)  # the machine may be busy
@given(st.data(), st.lists(cost, min_size=1, max_size=8), cost, cost)
def test_the_cut_is_the_best_of_all_cuts(data: st.DataObject, costs: list[float], first: float, last: float) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))

    def rank_of_cut(cut: tuple[range, ...]) -> tuple[Fraction, list[int]]:
        return largest(cut, costs, first, last), [len(stage) for stage in reversed(cut)]

    best = min(every_cut(len(costs), num_stages), key=rank_of_cut)
    assert cut_stages(costs, num_stages, first=first, last=last) == best


def test_head_and_embedding_take_layers_off_their_stages() -> None:
    assert cut_stages([1.0] * 8, 2) == (range(0, 4), range(4, 8))
    assert cut_stages([1.0] * 8, 2, last=2.0) == (range(0, 5), range(5, 8))
    assert cut_stages([1.0] * 8, 2, first=2.0) == (range(0, 3), range(3, 8))


def test_uneven_layers_leave_fewer_on_the_last_stage() -> None:
    assert [len(stage) for stage in cut_stages([1.0] * 5, 2)] == [3, 2]
    assert [len(stage) for stage in cut_stages([0.1] * 7, 3)] == [3, 3, 1]


def test_a_deep_model_is_cut_in_milliseconds() -> None:
    costs = [1e22 + i * math.pi for i in range(1000)]
    cut = cut_stages(costs, 64, first=3e21, last=4e22)
    assert best_cpu_seconds(lambda: cut_stages(costs, 64, first=3e21, last=4e22)) < 0.5
    assert len(cut) == 64


@pytest.mark.parametrize(
    ("costs", "num_stages", "message"),
    [
        ([1.0, 1.0], 3, "2 layers cannot be cut into 3 pipeline stages"),
        ([1.0], 0, "1 layers cannot be cut into 0 pipeline stages"),
        ([1.0, -1.0], 2, r"from 0 up, got -1\.0"),
        ([1.0, math.nan], 2, "from 0 up, got nan"),
        ([1.0, math.inf], 2, "from 0 up, got inf"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(costs: list[float], num_stages: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_stages(costs, num_stages)
