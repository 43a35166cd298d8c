from __future__ import annotations

import itertools
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.topology.grid import AXES, RankGrid
from tests.timing import best_cpu_seconds


@st.composite
def grids(draw: st.DrawFn) -> RankGrid:
    sizes = {axis: draw(st.integers(1, 4)) for axis in AXES}
    return RankGrid(sizes, tuple(draw(st.permutations(AXES))))


axes_of = st.lists(st.sampled_from(AXES), unique=True)


def test_first_axis_varies_fastest() -> None:
    grid = RankGrid({"tp": 2, "cp": 1, "dp": 2, "pp": 2})
    assert grid.coordinates(5) == {"tp": 1, "cp": 0, "dp": 0, "pp": 1}
    assert grid.group_of(5, "tp") == (4, 5)
    assert grid.group_of(5, "dp") == (5, 7)
    assert grid.group_of(5, "pp") == (1, 5)
    assert grid.group_of(5, ("tp", "pp")) == grid.group_of(5, ["pp", "tp"]) == (0, 1, 4, 5)
    assert grid.groups("pp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert RankGrid({"tp": 2, "pp": 2}, ("pp", "tp")).groups("tp") == ((0, 2), (1, 3))


@settings(deadline=None)  # the machine may be busy
@given(grids())
def test_coordinates_and_rank_are_inverse_in_any_order(grid: RankGrid) -> None:
    for rank in range(grid.size):
        assert grid.rank_of(grid.coordinates(rank)) == rank
    for positions in itertools.product(*(range(size) for size in grid.sizes.values())):
        coordinates = dict(zip(grid.sizes, positions, strict=True))
        assert grid.coordinates(grid.rank_of(coordinates)) == coordinates


@settings(deadline=None)  # the machine may be busy
@given(grids(), axes_of)
def test_groups_partition_the_ranks(grid: RankGrid, axes: list[str]) -> None:
    groups = grid.groups(axes)
    assert sorted(itertools.chain(*groups)) == list(range(grid.size))
    assert list(groups) == sorted(groups)
    assert all(list(group) == sorted(group) and len(group) == grid.group_size(axes) for group in groups)


@settings(deadline=None)  # the machine may be busy
@given(grids(), axes_of)
def test_a_group_is_the_ranks_that_differ_only_along_its_axes(grid: RankGrid, axes: list[str]) -> None:
    fixed = [axis for axis in grid.order if axis not in axes]
    by_definition: dict[tuple[int, ...], list[int]] = {}
    for rank in range(grid.size):
        at = grid.coordinates(rank)
        by_definition.setdefault(tuple(at[axis] for axis in fixed), []).append(rank)
    for ranks in by_definition.values():
        assert all(grid.group_of(rank, axes) == tuple(ranks) for rank in ranks)


@pytest.mark.parametrize("order", itertools.permutations(AXES))
def test_one_rank_of_16384_costs_its_own_group_only(order: tuple[str, ...]) -> None:
    grid = RankGrid({"tp": 8, "cp": 4, "dp": 32, "pp": 16}, order)
    assert grid.size == 16384
    grid.group_of(0, "tp")
    tracemalloc.start()
    for axis in AXES:
        group = grid.group_of(12345, axis)
        assert 12345 in group and len(group) == grid.sizes[axis]
        assert group[grid.coordinates(12345)[axis]] == 12345
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32_000  # bytes; a list of the world's ranks alone would be 131,072
    assert best_cpu_seconds(lambda: [grid.group_of(12345, axis) for axis in AXES]) < 0.05  # 0.1 ms where nothing else runs


def test_all_groups_of_16384_ranks_take_milliseconds() -> None:
    grid = RankGrid({"tp": 8, "cp": 4, "dp": 32, "pp": 16})
    assert all(len(grid.groups(axis)) * grid.sizes[axis] == 16384 for axis in AXES)
    assert best_cpu_seconds(lambda: [grid.groups(axis) for axis in AXES]) < 0.2  # 10 ms where nothing else runs


def test_grids_that_mean_the_same_are_equal() -> None:
    short, long = RankGrid({"dp": 2, "tp": 2}), RankGrid({"tp": 2, "cp": 1, "dp": 2, "pp": 1})
    assert short == long and hash(short) == hash(long)
    assert long != RankGrid({"tp": 2, "dp": 2}, ("dp", "tp", "cp", "pp"))


def test_a_grid_does_not_follow_the_mapping_it_was_built_from() -> None:
    sizes = {"tp": 2}
    grid = RankGrid(sizes)
    sizes["tp"] = 4
    assert grid.size == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RankGrid({"tp": 0}), "axis tp has size 0"),
        (lambda: RankGrid({"ep": 2}), r"axis ep \(size 2\) has no place in the order of axes \(tp, cp, dp, pp\)"),
        (lambda: RankGrid({"tp": 2}, ("tp", "tp")), "names one twice"),
        (lambda: RankGrid({"tp": 2}).coordinates(2), r"rank 2 is outside the grid of 2 ranks \(tp 2 x cp 1 x dp 1 x pp 1\)"),
        (lambda: RankGrid({"tp": 2}).coordinates(-1), "rank -1 is outside"),
        (lambda: RankGrid({"tp": 2}).rank_of({"tp": 2}), "position 2 is outside axis tp of size 2"),
        (lambda: RankGrid({"tp": 2}).rank_of({"ep": 0}), "no axis ep in this grid"),
        (lambda: RankGrid({"tp": 2}).group_of(0, "tensor"), "no axis tensor in this grid; its axes are tp, cp, dp, pp"),
        (lambda: RankGrid({"tp": 2}).group_of(7, "tp"), "rank 7 is outside"),
    ],
)
def test_what_is_not_in_the_grid_is_refused_by_name(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
