"""The original text of a prepared corpus, decoded from its shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dist_llm.data.index import load_index
from dist_llm.data.shards import open_shard
from dist_llm.data.tokenizer import Tokenizer

__all__ = ["iter_text"]


def iter_text(directory: Path | str, split: str, *, verify: bool = True) -> Iterator[tuple[str, bytes]]:
    """(source name, original UTF-8 bytes) of each document of a split, in the order of the stream.

    Raises:
        DataError: the corpus or one of its shards is missing, damaged or does not match.
    """
    index = load_index(directory)
    tokenizer = Tokenizer.load(index.tokenizer_path)
    for shard in index.split(split).shards:
        for sample in open_shard(index.directory, shard, verify=verify).samples():
            yield sample.source, tokenizer.decode_bytes(sample.tokens)
