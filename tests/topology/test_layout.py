from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.topology.layout import STANDARD, Layout, parse_layout
from dist_llm.utils.errors import ConfigError


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    size = st.sampled_from([1, 2, 3, 8, 64])
    chunks = draw(st.sampled_from([1, 2, 5]))
    return Layout(
        tp=draw(size),
        pp=draw(size),
        cp=draw(size),
        dp=draw(size),
        zero=draw(st.integers(0, 3)),
        sequence_parallel=draw(st.booleans()),
        cp_kind=draw(st.sampled_from(["ring", "all_to_all"])),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        schedule="1f1b" if chunks == 1 else "interleaved",
        chunks=chunks,
        micro_batch=draw(st.sampled_from([None, 1, 4])),
        uneven=draw(st.booleans()),
    )


@settings(deadline=None)  # the machine may be busy
@given(layouts(), st.sampled_from("-.,\u00b7 "))
def test_a_layout_is_read_back_from_its_name_with_any_separator(layout: Layout, separator: str) -> None:
    assert parse_layout(layout.name) == layout
    assert parse_layout(layout.name.replace("-", separator).upper()) == layout


@settings(deadline=None)  # the machine may be busy
@given(layouts(), layouts())
def test_two_layouts_share_a_name_only_if_they_are_equal(one: Layout, other: Layout) -> None:
    assert (one.name == other.name) == (one == other)


@settings(deadline=None)  # the machine may be busy
@given(layouts())
def test_the_grid_has_the_layouts_ranks(layout: Layout) -> None:
    assert layout.grid.size == layout.world_size
    assert layout.grid.group_size(("dp", "cp")) == layout.zero_size


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (Layout(), "single"),
        (Layout(tp=2, sequence_parallel=True), "tp2-sp"),
        (Layout(tp=2, pp=2, zero=1, dp=2), "tp2-pp2-zero1-dp2"),
        (Layout(cp=2), "cp2-ring"),
        (Layout(cp=2, cp_kind="all_to_all", zero=3), "cp2-a2a-zero3"),
        (Layout(dp=2), "zero0-dp2"),
        (Layout(recompute="full"), "recompute-full"),
        (Layout(pp=4, schedule="interleaved", chunks=2), "pp4-interleaved2"),
        (Layout(dp=2, zero=1, micro_batch=1, uneven=True), "zero1-dp2-mb1-uneven"),
    ],
)
def test_names(layout: Layout, name: str) -> None:
    assert layout.name == str(layout) == name


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("dp2.tp4", Layout(tp=4, dp=2)),
        ("cp2", Layout(cp=2)),
        ("cp2, all_to_all", Layout(cp=2, cp_kind="all_to_all")),
        ("pp2-interleaved", Layout(pp=2, schedule="interleaved", chunks=2)),
        ("pp2-1f1b", Layout(pp=2)),
        ("recompute.selective\u00b7tp2", Layout(tp=2, recompute="selective")),
    ],
)
def test_other_ways_to_say_it_are_read_too(text: str, layout: Layout) -> None:
    assert parse_layout(text) == layout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpp2-pp2", "layout tpp2-pp2: no word tpp2; did you mean tp2?"),
        ("2tp", "did you mean tp2?"),
        ("tp", "did you mean tp2?"),
        ("tp2-zreo3", "no word zreo3; did you mean zero3?"),
        ("pp2-inteleaved4", "did you mean interleaved4?"),
        ("pp2-1f1", "did you mean 1f1b?"),
        ("cp2-aa2", "did you mean a2a?"),
        ("cp2-rign", "did you mean ring?"),
        ("recompute-ful", "did you mean recompute-full?"),
        ("full", "did you mean recompute-full?"),
        ("recompute", "did you mean recompute-selective or recompute-full?"),
        ("quick", "no word quick; the words are tpN, ppN, cpN"),
        ("", "a layout has no name"),
        ("single-tp2", "single is one rank with nothing divided and stands alone"),
        ("tp2-tp4", "tp4 says again what tp is"),
        ("cp2-ring-a2a", "a2a says again what cp_kind is"),
        ("sp", "sp needs tp of at least 2, as in tp2-sp"),
        ("tp2-a2a", "all_to_all needs cp of at least 2, as in cp2-a2a"),
        ("interleaved3", "interleaved needs pp of at least 2, as in pp2-interleaved3"),
        ("pp2-interleaved1", "chunks is 1; schedule interleaved needs at least 2"),
        ("zero4", "zero is 4; ZeRO has the stages 0, 1, 2 and 3 (in zero4)"),
        ("tp0", "tp is 0; an axis has at least 1 rank (in tp0)"),
        ("mb0", "micro_batch is 0"),
    ],
)
def test_a_name_that_says_nothing_is_refused_with_the_nearest_word(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_layout(text)
    assert message in str(refused.value)


def test_a_value_outside_its_choices_is_refused() -> None:
    with pytest.raises(ValueError, match="cp_kind is ulysses; it is one of ring, all_to_all"):
        Layout(cp=2, cp_kind="ulysses")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunks is 2; schedule 1f1b has 1 chunk"):
        Layout(pp=2, chunks=2)


def test_what_has_no_axis_makes_no_difference() -> None:
    assert Layout(sequence_parallel=True, cp_kind="all_to_all", schedule="interleaved", chunks=3) == Layout()


def test_the_standard_list_has_every_promised_layout_once_and_fits_8_ranks() -> None:
    names = [layout.name for layout in STANDARD]
    assert len(set(names)) == len(names)
    promised = [
        "tp2",
        "tp4",
        "tp2-sp",
        "pp2",
        "pp4",
        "cp2-ring",
        "cp2-a2a",
        "zero0-dp2",
        "zero1-dp2",
        "zero2-dp2",
        "zero3-dp2",
        "zero3-dp4",
        "recompute-selective",
        "recompute-full",
        "tp2-pp2",
        "tp2-cp2-ring",
        "tp2-zero1-dp2",
        "tp2-zero2-dp2",
        "tp2-zero3-dp2",
        "pp2-zero1-dp2",
        "cp2-ring-zero1",
        "cp2-ring-zero2",
        "cp2-ring-zero3",
        "pp2-cp2-ring",
        "tp2-pp2-zero1-dp2",
        "tp2-cp2-ring-zero2-dp2",
    ]
    assert set(promised) <= set(names)
    assert any(layout.uneven for layout in STANDARD)
    assert max(layout.world_size for layout in STANDARD) == 8
