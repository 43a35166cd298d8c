"""Rows of fixed length over one split, as a pure function of the global sample number.

The documents of a split, in shard order, each between a begin and an end token, are one long stream. Row i is tokens
[i T, i T + T] of it: T inputs and T next-token targets that overlap by one, so that every token but the very first is predicted
exactly once. Nothing here knows about ranks or steps: who reads sample n, and when, is the caller's arithmetic, and the whole
state of a reader is the next n. Several sources can be mixed by a caller that maps its own numbers to those of the parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_llm.data.index import Index, load_index
from dist_llm.data.shards import ShardReader, open_shard
from dist_llm.utils.errors import DataError

__all__ = ["IGNORE", "Batch", "Cursor", "Row", "RowDataset", "row_order"]

# A target that counts for nothing; the value torch's cross-entropy ignores by default.
IGNORE = -100


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a run is in its data: the global number of the next sample."""

    next_sample: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One row. ``tokens``, ``targets``, ``positions``: (seq_len,) int64; ``doc_ids``: (seq_len,) int32.

    ``targets`` is ``IGNORE`` where the next token begins a document. ``doc_ids`` numbers the documents within the row from 0;
    ``positions`` restarts at each.
    """

    tokens: np.ndarray
    targets: np.ndarray
    doc_ids: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows on top of each other: as ``Row``, each (rows, seq_len)."""

    tokens: np.ndarray
    targets: np.ndarray
    doc_ids: np.ndarray
    positions: np.ndarray


def row_order(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch in the order they are visited: a permutation of ``range(num_rows)`` (num_rows,) int64.

    Sorts raw Philox numbers instead of calling ``permutation``: numpy promises the former never to change, the latter may.
    """
    key = hashlib.sha256(f"dist_llm row order, seed {seed}, epoch {epoch}".encode()).digest()
    raw = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8").astype(np.uint64)).random_raw(num_rows)
    return np.argsort(raw, kind="stable")


class RowDataset:
    """The rows of one split of one prepared corpus.

    Samples are numbered from 0 without end; sample n is row n mod ``num_rows`` of the order of epoch n // ``num_rows``. A training
    epoch leaves out the last, partial row. The ``eval_*`` methods instead cover the whole split once, unshuffled: their last row is padded.
    Shards are opened when first touched; ``verify`` compares their length and hash then.

    Raises:
        DataError: the corpus, its index or its tokenizer is missing, damaged or does not match; later, a shard.
    """

    def __init__(self, directory: Path | str, *, split: str, seq_len: int, seed: int, shuffle: bool, verify: bool = True) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, not {seq_len}")
        self.index: Index = load_index(directory)
        self.split = split
        self.seq_len = seq_len
        self._seed = seed
        self._shuffle = shuffle
        self._verify = verify
        self._info = self.index.split(split)
        self._readers: dict[int, tuple[ShardReader, np.ndarray]] = {}
        lengths = [shard.tokens + 2 * shard.documents for shard in self._info.shards]
        self._shard_starts = np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))])
        self._order: tuple[int, np.ndarray] | None = None
        if int(self._shard_starts[-1]) != self._info.stream_tokens:
            raise DataError(
                f"the index of {directory} contradicts itself: the shards of '{split}' do not add up to its totals; run `dist-llm data check {directory}`"
            )

    @property
    def num_rows(self) -> int:
        """Whole rows in an epoch; 0 when the split is shorter than a row."""
        return max(0, (self._info.stream_tokens - 1) // self.seq_len)

    @property
    def num_eval_rows(self) -> int:
        """Rows that cover the whole split, the last one padded."""
        return max(0, -(-(self._info.stream_tokens - 1) // self.seq_len))

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the split's original text: what bits per byte divides by."""
        return self._info.text_bytes

    @property
    def num_eval_targets(self) -> int:
        """Targets that count over all evaluation rows: every token of text and every end of a document."""
        return self._info.tokens + self._info.documents

    def row(self, n: int) -> Row:
        """Sample ``n`` of the endless sequence of epochs.

        Raises:
            DataError: the split is shorter than one row.
        """
        if n < 0:
            raise ValueError(f"a sample number cannot be negative, not {n}")
        if self.num_rows == 0:
            raise DataError(
                f"split '{self.split}' of {self.index.directory} is too small: {self._info.stream_tokens} tokens, a row of data.seq_len {self.seq_len} "
                f"needs {self.seq_len + 1}; add text, or lower data.seq_len"
            )
        epoch, at = divmod(n, self.num_rows)
        return self._build(int(self._order_of(epoch)[at]) if self._shuffle else at)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The samples with these numbers; a ``range`` is the usual argument."""
        return _stack([self.row(n) for n in numbers])

    def eval_row(self, number: int) -> Row:
        """Evaluation row ``number``, in the order of the stream.

        Past the last one comes padding alone, every target ignored: ranks can be given equal numbers of rows.
        """
        if number < 0:
            raise ValueError(f"a row number cannot be negative, not {number}")
        return self._build(number)

    def eval_batch(self, numbers: Sequence[int]) -> Batch:
        """The evaluation rows with these numbers."""
        return _stack([self.eval_row(n) for n in numbers])

    def iter_eval_rows(self) -> Iterator[Row]:
        """All evaluation rows: their summed loss in nats / ln 2 / ``text_bytes`` is the exact bits per byte."""
        return (self._build(number) for number in range(self.num_eval_rows))

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, row_order(self.num_rows, seed=self._seed, epoch=epoch))
        return self._order[1]

    def _build(self, number: int) -> Row:
        length = self.seq_len
        start = number * length
        stream, is_start = self._read(start, start + length + 1)
        real = max(0, len(stream) - 1)  # inputs that have a target
        tokens = np.full(length, self.index.tokenizer.pad_id, dtype=np.int64)
        targets = np.full(length, IGNORE, dtype=np.int64)
        tokens[:real] = stream[:real]
        # By place, not by value: what begins a document is known even if its text were to hold the same id.
        targets[:real] = np.where(is_start[1:], IGNORE, stream[1:])
        begins = np.zeros(length, dtype=bool)
        begins[:real] = is_start[:real]
        begins[0] = False  # the row's first document is number 0, wherever in it the row begins
        if 0 < real < length:
            begins[real] = True  # padding is a document of its own
        at = np.arange(length, dtype=np.int64)
        return Row(tokens, targets, np.cumsum(begins, dtype=np.int32), at - np.maximum.accumulate(np.where(begins, at, 0)))

    def _read(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Stream tokens [start, end), as far as there are any, and where documents begin: int64 and bool, both (tokens,)."""
        end = min(end, int(self._shard_starts[-1]))
        count = max(0, end - start)
        out = np.empty(count, dtype=np.int64)
        is_start = np.zeros(count, dtype=bool)
        at = start
        while at < end:
            number = int(np.searchsorted(self._shard_starts, at, side="right")) - 1
            reader, doc_starts = self._open(number)
            base = int(self._shard_starts[number])
            document = int(np.searchsorted(doc_starts, at - base, side="right")) - 1
            begin = base + int(doc_starts[document])
            tokens = reader.tokens(document)
            if at == begin:
                out[at - start] = self.index.tokenizer.bos_id
                is_start[at - start] = True
                at += 1
            offset = at - begin - 1
            take = min(len(tokens) - offset, end - at)
            if take > 0:
                out[at - start : at - start + take] = tokens[offset : offset + take]
                at += take
            if at < end and at == begin + 1 + len(tokens):
                out[at - start] = self.index.tokenizer.eos_id
                at += 1
        return out, is_start

    def _open(self, number: int) -> tuple[ShardReader, np.ndarray]:
        if number not in self._readers:
            reader = open_shard(self.index.directory, self._info.shards[number], verify=self._verify)
            # Where each document begins in the shard's part of the stream; two more tokens a document than its text has.
            starts = np.concatenate([[0], np.cumsum(reader.lengths + 2)[:-1]])
            self._readers[number] = (reader, starts)
        return self._readers[number]


def _stack(rows: Sequence[Row]) -> Batch:
    return Batch(
        tokens=np.stack([row.tokens for row in rows]),
        targets=np.stack([row.targets for row in rows]),
        doc_ids=np.stack([row.doc_ids for row in rows]),
        positions=np.stack([row.positions for row in rows]),
    )
