from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.generate.logits import keep_top_k, keep_top_p, pick, scale_temperature

# Few distinct values, so that ties are common.
ROWS = st.lists(st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, 1.0, 2.0])), min_size=1, max_size=20)


def kept(logits: torch.Tensor) -> list[int]:
    return logits[0].isfinite().nonzero()[:, 0].tolist()


@given(row=ROWS, k=st.integers(1, 25))
def test_top_k_keeps_exactly_the_k_largest_and_of_equals_the_lowest_ids(row: list[float], k: int) -> None:
    logits = torch.tensor([row])
    result = keep_top_k(logits, k)
    wanted = sorted(range(len(row)), key=lambda i: (-logits[0, i].item(), i))[:k]
    assert kept(result) == sorted(wanted)
    assert torch.equal(result[0, wanted], logits[0, wanted])


@given(row=ROWS, p=st.floats(1e-6, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(row: list[float], p: float) -> None:
    logits = torch.tensor([row])
    probabilities = logits[0].softmax(-1, dtype=torch.float64).tolist()
    ids = kept(keep_top_p(logits, p))
    order = sorted(range(len(row)), key=lambda i: (-logits[0, i].item(), i))
    assert ids == sorted(order[: len(ids)])
    assert ids, "never empty"
    assert math.fsum(probabilities[i] for i in ids) >= p - 1e-12
    if p < 1:
        assert math.fsum(probabilities[i] for i in order[: len(ids) - 1]) <= p + 1e-12


def test_top_p_looks_at_each_row_by_itself() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1]]).log()
    assert keep_top_p(logits, 0.6).isfinite().tolist() == [[True, True, False], [False, True, False]]


def test_a_nucleus_that_is_reached_exactly_takes_no_token_more() -> None:
    assert kept(keep_top_p(torch.zeros(1, 4), 0.5)) == [0, 1]


def test_a_nucleus_of_one_keeps_every_token_however_improbable() -> None:
    logits = torch.tensor([[0.0, -80.0, -200.0]])
    assert torch.equal(keep_top_p(logits, 1.0), logits)


@given(row=ROWS, temperature=st.floats(1e-300, 1e30), uniform=st.integers(0, 2**52 - 1))
def test_every_temperature_leaves_a_token_to_pick(row: list[float], temperature: float, uniform: int) -> None:
    logits = scale_temperature(torch.tensor([[*row, float("-inf")]], dtype=torch.float64), temperature)
    assert not logits.isnan().any()
    picked = int(pick(logits, torch.tensor([uniform * 2.0**-52], dtype=torch.float64)))
    assert picked < len(row)
    assert logits[0, picked].isfinite()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-52])
def test_a_token_of_probability_zero_is_never_picked(uniform: float) -> None:
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, -inf, 0.0, -inf]])
    assert int(pick(logits, torch.tensor([uniform], dtype=torch.float64))) == (1 if uniform < 0.5 else 3)


def test_dividing_by_a_small_temperature_approaches_the_most_probable() -> None:
    logits = scale_temperature(torch.tensor([[1.0, 1.1, 0.9]]), 1e-3)
    assert logits.softmax(-1)[0, 1] > 1 - 1e-6


@pytest.mark.parametrize(
    ("function", "value"), [(scale_temperature, 0.0), (scale_temperature, -1.0), (keep_top_k, 0), (keep_top_p, 0.0), (keep_top_p, 1.5)]
)
def test_a_value_out_of_range_is_refused_with_the_value(function: object, value: float) -> None:
    with pytest.raises(ValueError, match=str(value)):
        function(torch.zeros(1, 3), value)  # type: ignore[operator]
