from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.topology.sequence import columns_of_rank


@settings(deadline=None)  # the machine may be busy
@given(cp=st.integers(1, 8), width=st.integers(1, 5), zigzag=st.booleans())
def test_context_ranks_hold_every_column_once_and_equally_many(cp: int, width: int, zigzag: bool) -> None:
    seq_len = 2 * cp * width
    held = [list(itertools.chain(*columns_of_rank(seq_len, cp, rank, zigzag=zigzag))) for rank in range(cp)]
    assert sorted(itertools.chain(*held)) == list(range(seq_len))
    assert {len(columns) for columns in held} == {seq_len // cp}
    assert all(columns == sorted(columns) for columns in held)


@settings(deadline=None)  # the machine may be busy
@given(cp=st.integers(1, 8), width=st.integers(1, 5))
def test_zigzag_gives_every_rank_the_same_causal_work(cp: int, width: int) -> None:
    seq_len = 2 * cp * width
    # A query at column i looks at i + 1 keys.
    work = {sum(column + 1 for chunk in columns_of_rank(seq_len, cp, rank, zigzag=True) for column in chunk) for rank in range(cp)}
    assert len(work) == 1


def test_zigzag_pairs_an_early_chunk_with_a_late_one() -> None:
    assert columns_of_rank(16, 2, 0, zigzag=True) == [range(0, 4), range(12, 16)]
    assert columns_of_rank(16, 2, 1, zigzag=True) == [range(4, 8), range(8, 12)]
    assert columns_of_rank(16, 2, 1, zigzag=False) == [range(8, 16)]
    assert columns_of_rank(7, 1, 0, zigzag=True) == [range(7)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 2, 0, True), r"a row of 10 tokens .* seq_len must be divisible by 2 \* cp = 4"),
        ((9, 2, 0, False), r"a row of 9 tokens .* seq_len must be divisible by cp = 2"),
        ((8, 2, 2, False), "context rank 2 is outside a context group of size 2"),
        ((8, 0, 0, False), "context rank 0 is outside a context group of size 0"),
    ],
)
def test_a_row_that_does_not_divide_is_refused_with_the_rule(arguments: tuple[int, int, int, bool], message: str) -> None:
    seq_len, cp_size, cp_rank, zigzag = arguments
    with pytest.raises(ValueError, match=message):
        columns_of_rank(seq_len, cp_size, cp_rank, zigzag=zigzag)
