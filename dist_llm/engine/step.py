"""One training step, from the rows of the global batch to updated weights.

    1. fetch all micro-batches of this rank                        (engine/batches.py)
    2. one all-reduce: how many valid targets has the global batch, does any rank want to stop
    3. forward and backward of each micro-batch, its summed loss divided by that count; reduce, clip, update  (the engine)
    4. one all-reduce: the global loss

Dividing the sum by the global count, instead of averaging averages, is what makes the loss and its gradients independent of how
rows are spread over micro-batches and ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from dist_llm.comm.collectives import all_reduce_sum
from dist_llm.comm.context import ParallelContext
from dist_llm.engine.base import Engine
from dist_llm.engine.batches import StepBatches
from dist_llm.utils.errors import ExitCode

__all__ = ["StepResult", "Stopped", "train_step"]


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank but for the times."""

    loss: float  # nats per valid target of the global batch
    grad_norm: float  # before clipping
    num_tokens: int  # valid targets of the global batch
    step_s: float
    data_s: float


@dataclass(frozen=True)
class Stopped:
    """The ranks agreed to stop before this step; the exit code that was asked for."""

    code: int


def train_step(
    engine: Engine, ctx: ParallelContext, batches: StepBatches, *, next_sample: int, lr: float, stop_code: int
) -> StepResult | Stopped:
    """Take one step, or agree with all ranks not to.

    Args:
        engine: does the arithmetic.
        ctx: where this rank stands.
        batches: this rank's rows.
        next_sample: global sample number the step begins with.
        lr: learning rate of this step.
        stop_code: exit code this rank has been asked for, or 0.
    """
    start = time.perf_counter()
    micro_batches, valid = batches.at(next_sample)
    data_s = time.perf_counter() - start
    # The wishes to stop ride on the count: how many ranks were interrupted, how many asked to be requeued.
    total, interrupted, requeued = all_reduce_sum(
        [valid, stop_code == ExitCode.INTERRUPTED, stop_code == ExitCode.REQUEUE], ctx.world, ctx.device
    )
    if interrupted or requeued:
        return Stopped(ExitCode.INTERRUPTED if interrupted else ExitCode.REQUEUE)
    num_tokens = int(total)
    nll, grad_norm = engine.train_step(micro_batches, num_tokens=max(1, num_tokens), lr=lr)
    # Of ranks that computed the same tokens, one counts them.
    (nll_sum,) = all_reduce_sum([float(nll) if ctx.counts_loss else 0.0], ctx.world, ctx.device)
    return StepResult(
        loss=nll_sum / max(1, num_tokens),
        grad_norm=grad_norm,
        num_tokens=num_tokens,
        step_s=time.perf_counter() - start,
        data_s=data_s,
    )
