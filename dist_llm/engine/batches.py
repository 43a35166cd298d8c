"""Which rows a rank reads in a step, and how they reach its device.

Rows of step s (from 0) are the global samples s*B .. s*B + B-1. Micro-batch m of rank r takes rows
m*R*b + r*b .. + b, with R data-parallel ranks and micro-batch size b: the union over ranks and micro-batches is the same for
every R and b. Ranks of one tensor-parallel group or pipeline read the same rows; those of one context-parallel group keep
different columns of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import RunConfig
from dist_llm.data.rows import IGNORE, Batch
from dist_llm.engine.base import DeviceBatch
from dist_llm.parallel.divide import columns_of

__all__ = ["Rows", "StepBatches", "rows_of_rank", "to_device"]


def rows_of_rank(first: int, *, batch_size: int, micro: int, rank: int, ranks: int) -> list[range]:
    """Global sample numbers of each micro-batch of ``rank`` in the step that begins with sample ``first``."""
    per_round = micro * ranks
    assert batch_size % per_round == 0, f"batch_size {batch_size} is not a multiple of {micro} * {ranks}"
    return [range(first + r + rank * micro, first + r + (rank + 1) * micro) for r in range(0, batch_size, per_round)]


def to_device(
    batch: Batch, device: torch.device, *, document_mask: bool, samples: Sequence[int], columns: Sequence[range] | None = None
) -> DeviceBatch:
    """Move one micro-batch to ``device``.

    Args:
        batch: whole rows.
        device: where to.
        document_mask: positions restart at each document, which sees only itself; otherwise a row is one text.
        samples: global number of each row.
        columns: those this rank keeps, in order; default all.
    """
    kept = None if columns is None else np.concatenate([np.arange(r.start, r.stop) for r in columns])
    all_columns = np.arange(batch.tokens.shape[1])

    def moved(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array if kept is None else np.ascontiguousarray(array[:, kept])).to(device, non_blocking=True)

    positions = batch.positions if document_mask else np.tile(all_columns, (len(batch.tokens), 1))
    return DeviceBatch(
        tokens=moved(batch.tokens),
        targets=moved(batch.targets),
        positions=moved(positions),
        doc_ids=moved(batch.doc_ids) if document_mask else None,
        samples=torch.tensor(list(samples), dtype=torch.int64).to(device, non_blocking=True),
        columns=torch.from_numpy(all_columns if kept is None else kept).to(device, non_blocking=True),
    )


class Rows(Protocol):
    """Where rows come from by number: a corpus, or what ``verify`` makes up."""

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows with these global sample numbers."""
        ...


class StepBatches:
    """The micro-batches of one rank, step by step, as a pure function of the step's first sample number."""

    def __init__(self, rows: Rows, config: RunConfig, ctx: ParallelContext) -> None:
        self._rows = rows
        self._config = config
        self._ctx = ctx
        self._columns = columns_of(config.parallel, ctx, config.data.seq_len) if ctx.cp.size > 1 else None

    def at(self, next_sample: int) -> tuple[list[DeviceBatch], int]:
        """The micro-batches of the step that begins with ``next_sample``, and how many valid targets this rank counts in them.

        Summed over the world, the counts are those of the global batch: of ranks with the same tokens one counts them.
        """
        train = self._config.train
        batches, valid = [], 0
        for numbers in rows_of_rank(
            next_sample, batch_size=train.batch_size, micro=train.micro_batch_size, rank=self._ctx.dp.rank, ranks=self._ctx.dp.size
        ):
            rows = self._rows.batch(numbers)
            batch = to_device(rows, self._ctx.device, document_mask=self._config.data.document_mask, samples=numbers, columns=self._columns)
            if self._ctx.counts_loss:
                valid += int((batch.targets != IGNORE).sum())
            batches.append(batch)
        return batches, valid
