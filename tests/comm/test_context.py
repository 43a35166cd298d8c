from __future__ import annotations

import dataclasses

import pytest
import torch

from dist_llm.comm.context import SINGLE, Group, ParallelContext


def test_a_context_is_one_rank_alone_unless_told() -> None:
    ctx = ParallelContext(device=torch.device("cpu"))
    assert ctx.world == ctx.dp == SINGLE == Group(rank=0, size=1)
    assert (ctx.local_rank, ctx.local_size) == (0, 1)
    assert ctx.is_main


def test_the_first_rank_of_the_world_is_the_main_one() -> None:
    for rank in range(4):
        # The rank within a data-parallel group does not matter.
        ctx = ParallelContext(device=torch.device("cpu"), world=Group(rank=rank, size=4), dp=Group(rank=rank % 2, size=2))
        assert ctx.is_main == (rank == 0)


def test_groups_and_contexts_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SINGLE.size = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ParallelContext(device=torch.device("cpu")).dp = SINGLE  # type: ignore[misc]


def test_groups_are_equal_by_rank_and_size() -> None:
    assert Group(rank=1, size=2) == Group(rank=1, size=2)
    assert Group(rank=1, size=2) != Group(rank=0, size=2)
    assert "handle" not in repr(SINGLE)
