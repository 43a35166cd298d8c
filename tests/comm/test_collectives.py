from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_llm.comm.collectives import all_reduce_max, all_reduce_sum, barrier, broadcast_json, gather_json
from dist_llm.comm.context import SINGLE

from .three_ranks import CPU, LATE_S, SIZE, nested_value

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks got, from one launch."""
    directory = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.comm.three_ranks", str(directory)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, messages = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks are in its session
            pytest.fail(f"the ranks did not finish in {DEADLINE_S} s: {process.communicate()[1]}")
    assert process.returncode == 0, messages
    return [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(SIZE)]


def groups(answers: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(group size, what a member of it got), for the world of three and the pair within it."""
    return [(3, a["world"]) for a in answers] + [(2, a["pair"]) for a in answers[1:]]


def test_sums_of_counts_are_exact_up_to_2_to_the_53(answers: list[dict[str, Any]]) -> None:
    for size, got in groups(answers):
        assert got["sum"] == [2**53 - 1, 1, -0.5 * size, size * (size - 1) / 2]


def test_maxima_are_of_each_number_by_itself(answers: list[dict[str, Any]]) -> None:
    for size, got in groups(answers):
        assert got["max"] == [size - 1, -1, float("inf"), 1]


def test_broadcast_gives_the_first_ranks_value_to_all(answers: list[dict[str, Any]]) -> None:
    for _, got in groups(answers):
        assert got["broadcast"] == nested_value(7)
        assert got["broadcast empty"] == {}
        assert got["broadcast text"] == "é"


def test_gather_gives_all_values_in_rank_order_whatever_their_lengths(answers: list[dict[str, Any]]) -> None:
    for size, got in groups(answers):
        assert got["gather"] == [nested_value(rank) for rank in range(size)]
        assert got["gather empty"] == [{}] * size
        assert got["gather some empty"] == [{}] + ["x" * 3000] * (size - 1)
        assert got["gather large"] == [100_000 * rank for rank in range(size)]


@pytest.mark.parametrize("what", ["plain", "ours", "nested"])
def test_the_clock_shows_that_a_peer_was_late_and_counts_nested_calls_once(answers: list[dict[str, Any]], what: str) -> None:
    for rank, answer in enumerate(answers):
        counted, wall = answer["clock"][what]["counted"], answer["clock"][what]["wall"]
        assert counted <= wall
        assert wall - counted < 0.25 * LATE_S
        # The late one does not wait; half of the delay is left for a busy machine.
        assert (counted > 0.5 * LATE_S) == (rank != SIZE - 1)
        assert answer["clock"][what]["again"] == 0
    assert all(answer["clock"]["restored"] for answer in answers)


def test_a_group_of_one_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    assert all_reduce_sum([3, True, 0.5], SINGLE, CPU) == [3.0, 1.0, 0.5]
    assert all_reduce_max([-3, False], SINGLE, CPU) == [-3.0, 0.0]
    assert all_reduce_sum([], SINGLE, CPU) == []
    assert broadcast_json(nested_value(3), SINGLE, CPU) == nested_value(3)
    assert gather_json({}, SINGLE, CPU) == [{}]
    barrier(SINGLE, torch.device("meta"))  # touches no device either
