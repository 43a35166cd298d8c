"""Loss on held-out documents, divided over the ranks: every token predicted once."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from dist_llm.comm.collectives import all_reduce_sum
from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import RunConfig
from dist_llm.data.rows import IGNORE, RowDataset
from dist_llm.engine.base import Engine
from dist_llm.engine.batches import to_device
from dist_llm.parallel.divide import columns_of

__all__ = ["HeldOut", "evaluate_held_out"]


@dataclass(frozen=True)
class HeldOut:
    """Result of one evaluation."""

    loss: float  # nats per target
    bits_per_byte: float  # of the original text
    tokens: int
    bytes: float  # exact when all rows were read, else the share of the split's bytes
    eval_s: float


def evaluate_held_out(engine: Engine, ctx: ParallelContext, rows: RowDataset, config: RunConfig, *, limit: int | None) -> HeldOut:
    """Evaluate on the validation split.

    Args:
        engine: holds the model.
        ctx: where this rank stands.
        rows: the validation split.
        config: the run.
        limit: read only about that many rows, evenly spaced; None reads all.
    """
    start = time.perf_counter()
    micro = config.train.micro_batch_size
    num_rows = rows.num_eval_rows if limit is None else min(limit, rows.num_eval_rows)
    nll, tokens = 0.0, 0
    columns = columns_of(config.parallel, ctx, config.data.seq_len) if ctx.cp.size > 1 else None
    # Every rank runs the same number of forwards, since under ZeRO-3 each of them is a collective: past the last row come
    # rows of padding, in which no target counts.
    for first in range(0, num_rows, micro * ctx.dp.size):
        mine = range(first + ctx.dp.rank * micro, first + (ctx.dp.rank + 1) * micro)
        # A part is spread evenly over the split: its first rows would be its first few documents.
        batch = rows.eval_batch([n * rows.num_eval_rows // num_rows if n < num_rows else rows.num_eval_rows for n in mine])
        own = to_device(batch, ctx.device, document_mask=config.data.document_mask, samples=mine, columns=columns)
        value = float(engine.eval_nll(own))
        if ctx.counts_loss:
            nll += value
            tokens += int((own.targets != IGNORE).sum())
    total_nll, total_tokens = all_reduce_sum([nll, float(tokens)], ctx.world, ctx.device)
    split_bytes, split_targets = rows.text_bytes, rows.num_eval_targets
    num_bytes = split_bytes if limit is None or num_rows == rows.num_eval_rows else split_bytes * total_tokens / split_targets
    return HeldOut(
        loss=total_nll / total_tokens,
        bits_per_byte=total_nll / math.log(2) / num_bytes,
        tokens=int(total_tokens),
        bytes=num_bytes,
        eval_s=time.perf_counter() - start,
    )
