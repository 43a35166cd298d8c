"""How many tokens a second this machine trains, with the ranks and the engine a run will have.

Measured on a few sizes, since small models are bound by the number of ops and large ones by arithmetic; ``planning.budget`` reads
between them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from dist_llm.comm.collectives import all_reduce_max, barrier
from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from dist_llm.engine.base import DeviceBatch
from dist_llm.engine.build import build_engine, choose_ops, uses_deepspeed
from dist_llm.engine.launch import close_context, open_context, tune_allocator
from dist_llm.engine.ranks import Launch
from dist_llm.planning.budget import SpeedPoint, ladder
from dist_llm.planning.count import flops_per_token

__all__ = ["measure_speed"]

_WARM_UP = 2
_MIN_STEPS = 4


def measure_speed(
    launch: Launch,
    *,
    widths: Sequence[int],
    vocab_size: int,
    seq_len: int,
    batch_size: int,
    zero: int,
    precision: str,
    seconds_each: float,
) -> dict[str, Any]:
    """Train a model of each width on random tokens for a few seconds; every rank calls this.

    Args:
        launch: the ranks of this launch.
        widths: one model of the planning ladder for each, the deepest of that width.
        vocab_size: of the tokenizer.
        seq_len: tokens in a row.
        batch_size: rows in a step over all ranks.
        zero: ZeRO stage on several ranks.
        precision: as in the config.
        seconds_each: time to spend on a model.

    Returns:
        ``{"ranks", "threads", "precision", "points": [SpeedPoint as a dict, ...]}``, the same on every rank.
    """
    by_width = {model.d_model: model for model in ladder(vocab_size, seq_len)}
    if not torch.cuda.is_available():
        tune_allocator()
    first = _config(by_width[widths[0]], launch, seq_len, batch_size, zero, precision)
    ctx = open_context(launch, needs_process_group=uses_deepspeed(first, launch.world_size))
    try:
        points = []
        for width in widths:
            config = _config(by_width[width], launch, seq_len, batch_size, zero, precision)
            step_s = _median_step(config, ctx, seconds_each)
            points.append(
                SpeedPoint(
                    d_model=width,
                    num_layers=config.model.num_layers,
                    flops_per_token=flops_per_token(config.model, seq_len),
                    tokens_per_s=batch_size * seq_len / step_s,
                )
            )
        return {
            "ranks": launch.world_size,
            "threads": torch.get_num_threads(),
            "precision": precision,
            "batch_tokens": batch_size * seq_len,
            "points": [asdict(p) for p in points],
        }
    finally:
        close_context()


def _config(model: ModelConfig, launch: Launch, seq_len: int, batch_size: int, zero: int, precision: str) -> RunConfig:
    return RunConfig(
        precision=precision,
        model=model,
        data=DataConfig(seq_len=seq_len),
        train=TrainConfig(steps=1000, batch_size=batch_size, micro_batch_size=batch_size // launch.world_size),
        optim=OptimConfig(lr=1e-3),
        parallel=ParallelConfig(zero=zero),
    )


def _median_step(config: RunConfig, ctx: ParallelContext, seconds: float) -> float:
    engine = build_engine(config, ctx, choose_ops(config, ctx), None)
    shape = (config.train.micro_batch_size, config.data.seq_len)
    generator = torch.Generator().manual_seed(ctx.world.rank)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator).to(ctx.device)
    batch = DeviceBatch(tokens, tokens, torch.arange(shape[1], device=ctx.device).expand(shape), None)
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while True:
        # Rank 0's clock could differ from another's: they decide together whether to go on.
        (go_on,) = all_reduce_max([len(times) < _WARM_UP + _MIN_STEPS or time.perf_counter() < stop], ctx.world, ctx.device)
        if not go_on:
            break
        barrier(ctx.world, ctx.device)
        start = time.perf_counter()
        nll, _ = engine.train_step([batch], num_tokens=config.train.batch_size * shape[1], lr=1e-3)
        nll.item()  # a GPU has only been asked so far
        (slowest,) = all_reduce_max([time.perf_counter() - start], ctx.world, ctx.device)
        times.append(slowest)
    engine.close()
    return median(times[_WARM_UP:])
