from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from dist_llm.comm import clock as clock_module
from dist_llm.comm.clock import CommClock


def functions() -> dict[str, object]:
    return {name: getattr(dist, name) for name in clock_module._COLLECTIVES}


def test_every_collective_is_wrapped_inside_and_as_before_outside() -> None:
    before = functions()
    assert len(before) == 10
    with CommClock():
        inside = functions()
        assert all(inside[name] is not before[name] for name in before)
        assert all(inside[name].__name__ == before[name].__name__ for name in before)
    assert functions() == before


def test_functions_come_back_after_an_exception() -> None:
    before = functions()
    with pytest.raises(RuntimeError, match="elsewhere"), CommClock():
        raise RuntimeError("elsewhere")
    assert functions() == before


def test_a_collective_that_fails_raises_what_it_raised_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_and_wrong(tensor: torch.Tensor) -> None:
        time.sleep(0.02)
        raise ValueError("no such group")

    monkeypatch.setattr(dist, "all_reduce", slow_and_wrong)
    with CommClock() as clock:
        for _ in range(2):  # after a failure the next call is again an outermost one
            with pytest.raises(ValueError, match="no such group"):
                dist.all_reduce(torch.ones(1))
            assert clock.take() >= 0.02
    assert clock.take() == 0


def test_two_clocks_one_inside_the_other_both_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow() -> None:
        time.sleep(0.02)

    monkeypatch.setattr(dist, "barrier", slow)
    with CommClock() as outer:
        with CommClock() as inner:
            dist.barrier()
        dist.barrier()
    assert 0.02 <= inner.take() < outer.take()
    assert dist.barrier is slow
