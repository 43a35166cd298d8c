"""The groups of every rank are those that its coordinates say, and each of them communicates."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

from dist_llm.comm.build import build_context
from dist_llm.comm.context import SINGLE, Group, ParallelContext
from dist_llm.parallel.ranks import run_on_ranks
from dist_llm.topology.grid import RankGrid

WORLD = 8
NAMES = ("world", "tp", "cp", "dp", "pp", "zero", "model", "kv", "ends", "pp_back")
# (sizes, order, key-value heads): triples, a long pipeline, copies of key-value heads, another order, one axis alone.
GRIDS: list[tuple[dict[str, int], tuple[str, ...], int | None]] = [
    ({"tp": 2, "cp": 2, "pp": 2}, ("tp", "cp", "dp", "pp"), 4),
    ({"tp": 2, "dp": 2, "pp": 2}, ("tp", "cp", "dp", "pp"), 1),
    ({"tp": 4, "dp": 2}, ("tp", "cp", "dp", "pp"), 2),
    ({"tp": 8}, ("tp", "cp", "dp", "pp"), 2),
    ({"pp": 4, "cp": 2}, ("tp", "cp", "dp", "pp"), 1),
    ({"cp": 2, "dp": 4}, ("tp", "cp", "dp", "pp"), None),
    ({"tp": 2, "cp": 2, "pp": 2}, ("pp", "dp", "cp", "tp"), 4),
    ({"dp": 8}, ("tp", "cp", "dp", "pp"), 2),
]


def groups_of_all_grids(ctx: ParallelContext) -> list[dict[str, tuple[tuple[int, ...], int, float]]]:
    """Of each grid and group: its ranks, this rank's place in it, and 10^rank summed over it, whose digits say who took part."""
    answers = []
    for sizes, order, kv_heads in GRIDS:
        mine = build_context(
            RankGrid(sizes, order), ctx.world.rank, ctx.device, kv_heads=kv_heads, local_rank=ctx.world.rank, local_size=WORLD
        )
        assert (mine.local_rank, mine.local_size) == (ctx.world.rank, WORLD)
        answer = {}
        for name in NAMES:
            group: Group = getattr(mine, name)
            total = torch.tensor([10.0**ctx.world.rank], dtype=torch.float64)
            if group.handle is not None:
                assert dist.get_world_size(group.handle) == group.size
                dist.all_reduce(total, group=group.handle)
            answer[name] = (group.ranks if group.handle is not None else (), group.rank, total.item())
        # DeepSpeed communicates in these even where they are one rank.
        assert mine.zero.handle is not None and mine.model.handle is not None
        assert mine.pp.size == 1 or mine.pp.handle is not mine.pp_back.handle
        assert set(mine.named_groups()) == {name for name in NAMES if getattr(mine, name).size > 1}
        assert mine.counts_loss == (mine.tp.rank == 0 and mine.pp.rank == mine.pp.size - 1)
        assert mine.is_main == (ctx.world.rank == 0)
        answers.append(answer)
    return answers


def coordinates(sizes: dict[str, int], order: tuple[str, ...]) -> list[dict[str, int]]:
    """Of every rank, counted by hand: the first axis of the order varies fastest."""
    slowest_first = [range(sizes.get(axis, 1)) for axis in reversed(order)]
    return [dict(zip(reversed(order), place, strict=True)) for place in itertools.product(*slowest_first)]


def test_every_group_of_every_grid_has_the_ranks_that_differ_along_its_axes_only() -> None:
    answers = run_on_ranks(groups_of_all_grids, dp=WORLD)
    axes = {"world": ("tp", "cp", "dp", "pp"), "zero": ("cp", "dp"), "model": ("tp", "pp"), "pp_back": ("pp",)}
    for number, (sizes, order, kv_heads) in enumerate(GRIDS):
        places = coordinates(sizes, order)
        for rank in range(WORLD):
            for name in ("world", "tp", "cp", "dp", "pp", "zero", "model", "pp_back"):
                along = axes.get(name, (name,))
                fixed = [axis for axis in order if axis not in along]
                expected = tuple(r for r in range(WORLD) if all(places[r][axis] == places[rank][axis] for axis in fixed))
                ranks, place, total = answers[rank][number][name]
                if len(expected) == 1 and name not in ("zero", "model"):
                    assert ranks == (), (sizes, name)  # no process group at all
                else:
                    assert ranks == expected and expected[place] == rank, (sizes, rank, name)
                assert total == sum(10.0**r for r in expected), (sizes, rank, name)
            tp_size, stages = sizes.get("tp", 1), sizes.get("pp", 1)
            tp_ranks = [r for r in range(WORLD) if all(places[r][axis] == places[rank][axis] for axis in order if axis != "tp")]
            # Key-value head of a rank: tp_rank * heads // tp.
            kv_head = {r: places[r]["tp"] * (kv_heads or tp_size) // tp_size for r in tp_ranks}
            copies = tuple(r for r in tp_ranks if kv_head[r] == kv_head[rank]) if (kv_heads or tp_size) < tp_size else ()
            assert answers[rank][number]["kv"][0] == copies, (sizes, rank)
            pp_ranks = [r for r in range(WORLD) if all(places[r][axis] == places[rank][axis] for axis in order if axis != "pp")]
            is_end = stages > 1 and places[rank]["pp"] in (0, stages - 1)
            assert answers[rank][number]["ends"][0] == ((pp_ranks[0], pp_ranks[-1]) if is_end else ()), (sizes, rank)


def test_without_a_process_group_every_group_is_one_rank() -> None:
    ctx = ParallelContext(device=torch.device("cpu"))
    assert all(getattr(ctx, name) is SINGLE for name in NAMES) and ctx.named_groups() == {}
    assert ctx.counts_loss and ctx.is_first_stage and ctx.is_last_stage
