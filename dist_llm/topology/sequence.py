"""Which columns of a row a context-parallel rank holds.

Under a causal mask the last tokens of a row cost the most, so a ring of contiguous chunks would leave its first rank idle.
The zigzag cut makes 2 * cp chunks and gives rank r the chunks r and 2*cp - 1 - r: an early one with a late one, the same
work for every rank (Llama 3, arXiv:2407.21783, section 3.3.2). All-to-all attention sees whole rows
on fewer heads, its ranks hold one contiguous chunk each.
"""

from __future__ import annotations

__all__ = ["columns_of_rank"]


def columns_of_rank(seq_len: int, cp_size: int, cp_rank: int, *, zigzag: bool) -> list[range]:
    """The columns of a row of ``seq_len`` tokens that ``cp_rank`` holds, as chunks in the order the rank stores them.

    Two chunks of seq_len / (2 * cp_size) columns with ``zigzag``, one of seq_len / cp_size without, and the whole row on a
    group of one. Raises ``ValueError`` where the row does not divide.
    """
    if cp_size < 1 or not 0 <= cp_rank < cp_size:
        raise ValueError(f"context rank {cp_rank} is outside a context group of size {cp_size}")
    if cp_size == 1:
        return [range(seq_len)]
    num_chunks = 2 * cp_size if zigzag else cp_size
    if seq_len % num_chunks != 0:
        rule = f"2 * cp = {num_chunks} (the ring cuts it in two chunks a rank)" if zigzag else f"cp = {num_chunks}"
        raise ValueError(f"a row of {seq_len} tokens cannot be divided over context parallelism: seq_len must be divisible by {rule}")
    width = seq_len // num_chunks
    chunks = (cp_rank, num_chunks - 1 - cp_rank) if zigzag else (cp_rank,)
    return [range(chunk * width, (chunk + 1) * width) for chunk in chunks]
