"""Rows made up for a comparison: what would hide a mistake is put in their way.

Targets that do not count are spread unevenly (every fourth row has none that do), so that an average of averages differs from the
average; documents begin and end anywhere; tokens use the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_llm.config.schema import RunConfig
from dist_llm.data.rows import IGNORE, Batch

__all__ = ["MadeUpRows"]


class MadeUpRows:
    """Rows as a function of seed and sample number, in the form of ``data.rows.RowDataset.batch``."""

    def __init__(self, config: RunConfig) -> None:
        self._vocab_size = config.model.vocab_size
        self._seq_len = config.data.seq_len
        self._seed = config.seed

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows with these global sample numbers."""
        rows = [self._row(number) for number in numbers]
        tokens, targets, positions, doc_ids = (np.stack(column) for column in zip(*rows, strict=True))
        return Batch(tokens=tokens, targets=targets, positions=positions, doc_ids=doc_ids)

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, number]))
        length = self._seq_len
        text = generator.integers(0, self._vocab_size, length + 1)
        share_ignored = (0.0, 0.3, 0.8, 1.0)[number % 4]
        targets = np.where(generator.random(length) < share_ignored, IGNORE, text[1:])
        doc_ids = np.sort(generator.integers(0, 4, length)).astype(np.int32)
        starts = np.maximum.accumulate(np.where(np.diff(doc_ids, prepend=-1) != 0, np.arange(length), 0))
        return text[:-1], targets, np.arange(length) - starts, doc_ids
