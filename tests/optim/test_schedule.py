from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.config.schema import OptimConfig
from dist_llm.optim.schedule import learning_rate


def rates(steps: int, **options: object) -> list[float]:
    """The rate of each step; index 0 is step 1."""
    optim = OptimConfig(**{"lr": 3e-4, **options})
    return [learning_rate(step, optim=optim, steps=steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    found = rates(100, schedule=schedule, warmup_steps=10)
    assert found[:10] == pytest.approx([3e-4 * n / 10 for n in range(1, 11)])
    assert found[0] > 0, "the first step is not wasted"
    assert max(found) == pytest.approx(3e-4)


def test_cosine_ends_at_the_ratio_and_is_halfway_in_the_middle() -> None:
    found = rates(110, schedule="cosine", warmup_steps=10, min_lr_ratio=0.1)
    assert found[9] == pytest.approx(3e-4)
    assert found[-1] == pytest.approx(3e-5, rel=1e-12)
    assert found[59] == pytest.approx((3e-4 + 3e-5) / 2)  # step 60, 50 of 100 after the warm-up
    assert found[34] == pytest.approx(3e-5 + 2.7e-4 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_flat_until_its_decay_and_then_falls_in_equal_steps() -> None:
    found = rates(50, schedule="wsd", warmup_steps=5, decay_steps=20, min_lr_ratio=0.25)
    assert found[5:30] == [3e-4] * 25  # steps 6 to 30: the last one at the peak is 20 steps before the end
    assert found[30] < 3e-4
    drops = [a - b for a, b in itertools.pairwise(found[29:])]
    assert drops == pytest.approx([3e-4 * 0.75 / 20] * 20)
    assert found[-1] == pytest.approx(0.25 * 3e-4, rel=1e-12)


def test_wsd_decays_over_a_fifth_of_the_run_unless_told() -> None:
    assert rates(50, schedule="wsd") == rates(50, schedule="wsd", decay_steps=10)
    assert rates(3, schedule="wsd", min_lr_ratio=0.0) == [3e-4, 3e-4, 0.0]


def test_constant_stays() -> None:
    assert rates(20, schedule="constant", warmup_steps=3)[3:] == [3e-4] * 17


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_one_step_and_a_run_of_warm_up_only_are_defined(schedule: str) -> None:
    assert len(rates(1, schedule=schedule)) == 1
    assert rates(4, schedule=schedule, warmup_steps=4)[-1] == pytest.approx(3e-4)


@pytest.mark.parametrize("step", [0, -1, 101])
def test_steps_outside_of_the_run_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match=rf"step {step} is not one of 1\.\.100"):
        learning_rate(step, optim=OptimConfig(lr=1e-3), steps=100)


@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    decay=st.none() | st.integers(1, 300),
    ratio=st.floats(0, 1),
)
def test_every_schedule_rises_once_and_falls_once_between_zero_and_the_peak(
    schedule: str, steps: int, warmup: int, decay: int | None, ratio: float
) -> None:
    warmup = min(warmup, steps)
    decay = None if decay is None or schedule != "wsd" else max(1, min(decay, steps - warmup))
    optim = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=warmup, decay_steps=decay, min_lr_ratio=ratio)
    found = [learning_rate(step, optim=optim, steps=steps) for step in range(1, steps + 1)]
    ulps = 1e-12
    assert all(a <= b + ulps for a, b in itertools.pairwise(found[:warmup]))
    assert all(a >= b - ulps for a, b in itertools.pairwise(found[max(0, warmup - 1) :]))
    assert all(0 <= rate <= 1 + ulps for rate in found)
    assert all(rate >= ratio - ulps for rate in found[warmup:])
    if schedule != "constant" and steps > warmup:
        assert found[-1] == pytest.approx(ratio, abs=1e-12)
