from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from dist_llm.cluster.health import Beat, Failure, HealthDir
from dist_llm.utils.errors import StorageError


def made(run_dir: Path, attempt: int = 1) -> HealthDir:
    health = HealthDir(run_dir, attempt)
    health.prepare()
    return health


def beat(rank: int, step: int = 0) -> Beat:
    return Beat(rank=rank, host="n1", pid=100 + rank, step=step, where="step (step.py:1)", waits=True)


def failure(rank: int) -> Failure:
    return Failure(code=1, reason=f"rank {rank} raised", rank=rank, host="n1", step=7, traceback="T", teller=rank)


def test_what_ranks_said_is_read_and_the_newest_counts(tmp_path: Path) -> None:
    health = made(tmp_path)
    for rank, step in ((0, 1), (1, 1), (0, 2)):
        health.beat(beat(rank, step))
    assert health.beats() == {0: beat(0, 2), 1: beat(1, 1)}


def test_a_rank_has_left_once_it_says_so_and_may_say_it_twice(tmp_path: Path) -> None:
    health = made(tmp_path)
    health.beat(beat(1))
    assert not health.has_left(1)
    health.leave(1)
    health.leave(1)
    assert health.has_left(1) and health.beats() == {}


def test_the_first_failure_is_kept_and_told_to_whoever_comes_second(tmp_path: Path) -> None:
    health = made(tmp_path)
    assert health.first_failure() is None
    assert health.claim(failure(3)) == failure(3)
    assert health.claim(failure(0)) == failure(3)
    assert HealthDir(tmp_path, 1).first_failure() == failure(3)
    assert [p.name for p in health.path.iterdir() if p.is_file()] == ["failure.json"]


def _claim(run_dir: Path, rank: int, answers: multiprocessing.queues.Queue[int | None]) -> None:
    answers.put(HealthDir(run_dir, 1).claim(failure(rank)).rank)


def test_processes_that_claim_together_agree_on_one(tmp_path: Path) -> None:
    made(tmp_path)
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.queues.Queue[int | None] = context.Queue()
    processes = [context.Process(target=_claim, args=(tmp_path, rank, answers)) for rank in range(12)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=20) for _ in processes}
    for process in processes:
        process.join(20)
    assert len(found) == 1


def test_a_new_attempt_starts_clean_and_keeps_why_the_earlier_ones_ended(tmp_path: Path) -> None:
    first = made(tmp_path, 1)
    first.beat(beat(0))
    first.claim(failure(0))
    stale = made(tmp_path, 2)
    stale.claim(failure(1))  # of a start that never got as far as its logs
    second = made(tmp_path, 2)
    assert second.first_failure() is None
    assert first.first_failure() == failure(0) and first.beats() == {}


def test_a_half_written_file_says_nothing(tmp_path: Path) -> None:
    health = made(tmp_path)
    (health.path / "failure.json").write_text('{"code": 1')
    (health.path / "ranks" / "rank-0.json").write_text("[]")
    assert health.first_failure() is None and health.beats() == {}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "health").write_text("in the way")
    health = HealthDir(tmp_path, 1)
    with pytest.raises(StorageError, match=r"health/attempt-1/ranks: .*check its owner"):
        health.prepare()
    with pytest.raises(StorageError, match=r"cannot write .*failure\.json"):
        health.claim(failure(0))
    assert health.first_failure() is None
