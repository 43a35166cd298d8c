"""Which rows a rank reads in a step, and how they reach its device.

Rows of step s (from 0) are the global samples s*B .. s*B + B-1. Micro-batch m of rank r takes rows
m*R*b + r*b .. + b, with R ranks and micro-batch size b: the union over ranks and micro-batches is the same for every R and b.
"""

from __future__ import annotations

import numpy as np
import torch

from dist_llm.comm.context import Group
from dist_llm.config.schema import RunConfig
from dist_llm.data.rows import IGNORE, Batch, RowDataset
from dist_llm.engine.base import DeviceBatch

__all__ = ["StepBatches", "rows_of_rank", "to_device"]


def rows_of_rank(first: int, *, batch_size: int, micro: int, rank: int, ranks: int) -> list[range]:
    """Global sample numbers of each micro-batch of ``rank`` in the step that begins with sample ``first``."""
    per_round = micro * ranks
    assert batch_size % per_round == 0, f"batch_size {batch_size} is not a multiple of {micro} * {ranks}"
    return [range(first + r + rank * micro, first + r + (rank + 1) * micro) for r in range(0, batch_size, per_round)]


def to_device(batch: Batch, device: torch.device, *, document_mask: bool) -> DeviceBatch:
    """Move one micro-batch to ``device``. Without ``document_mask`` a row is one text and positions run through it."""
    positions = torch.from_numpy(batch.positions) if document_mask else torch.arange(batch.tokens.shape[1]).expand(batch.tokens.shape)
    return DeviceBatch(
        tokens=torch.from_numpy(batch.tokens).to(device, non_blocking=True),
        targets=torch.from_numpy(batch.targets).to(device, non_blocking=True),
        positions=positions.to(device, non_blocking=True),
        doc_ids=torch.from_numpy(batch.doc_ids).to(device, non_blocking=True) if document_mask else None,
    )


class StepBatches:
    """The micro-batches of one rank, step by step, as a pure function of the step's first sample number."""

    def __init__(self, rows: RowDataset, config: RunConfig, dp: Group, device: torch.device) -> None:
        self._rows = rows
        self._config = config
        self._dp = dp
        self._device = device

    def at(self, next_sample: int) -> tuple[list[DeviceBatch], int]:
        """The micro-batches of the step that begins with ``next_sample``, and how many valid targets they hold."""
        train = self._config.train
        batches, valid = [], 0
        for numbers in rows_of_rank(
            next_sample, batch_size=train.batch_size, micro=train.micro_batch_size, rank=self._dp.rank, ranks=self._dp.size
        ):
            batch = self._rows.batch(numbers)
            valid += int(np.count_nonzero(batch.targets != IGNORE))
            batches.append(to_device(batch, self._device, document_mask=self._config.data.document_mask))
        return batches, valid
