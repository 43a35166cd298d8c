"""Seconds of collectives over sizes, between the ranks of one machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.comm.collectives import all_reduce_max, barrier
from dist_llm.comm.context import ParallelContext

__all__ = ["SIZES", "measure_links"]

SIZES = (4 << 10, 64 << 10, 1 << 20, 8 << 20, 32 << 20)
_MIN_REPEATS, _MAX_REPEATS = 5, 200


def measure_links(ctx: ParallelContext, *, seconds: float, sizes: Sequence[int] = SIZES) -> list[dict[str, Any]]:
    """Time fp32 collectives of the whole world; every rank calls this.

    Args:
        ctx: where this rank stands.
        seconds: for each collective and size.
        sizes: bytes, multiples of four times the ranks.

    Returns:
        ``[{"collective", "bytes", "s"}]``, the same on every rank, empty for one rank. ``bytes`` as ``planning.collectives`` counts
        them: what each rank holds of an all-reduce, what all hold together of an all-gather or a reduce-scatter, a message of a send.
        ``s`` from when all ranks have come to when the last one is done.
    """
    if ctx.world.size == 1:
        return []
    points = []
    for size in sizes:
        for name, call in _calls(ctx, size).items():
            points.append({"collective": name, "bytes": size, "s": _seconds(call, ctx, seconds) / (2 if name == "send" else 1)})
    return points


def _calls(ctx: ParallelContext, size: int) -> dict[str, Callable[[], Any]]:
    group, ranks = ctx.world.handle, ctx.world.size
    whole = torch.zeros(size // 4, device=ctx.device)
    part = torch.zeros(size // 4 // ranks, device=ctx.device)

    def there_and_back() -> None:
        # Between the first two ranks, both ways one after the other: half of it is one message.
        if ctx.world.rank == 0:
            dist.send(whole, group=group, group_dst=1)
            dist.recv(whole, group=group, group_src=1)
        elif ctx.world.rank == 1:
            dist.recv(whole, group=group, group_src=0)
            dist.send(whole, group=group, group_dst=0)

    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "send": there_and_back,
    }


def _seconds(call: Callable[[], Any], ctx: ParallelContext, seconds: float) -> float:
    def once() -> float:
        barrier(ctx.world, ctx.device)
        start = time.perf_counter()
        call()
        if ctx.device.type == "cuda":
            torch.cuda.synchronize(ctx.device)
        return time.perf_counter() - start

    once()
    # Every rank repeats as often as the slowest would.
    (expected,) = all_reduce_max([once()], ctx.world, ctx.device)
    repeats = max(_MIN_REPEATS, min(_MAX_REPEATS, int(seconds / max(1e-6, expected))))
    times = [once() for _ in range(repeats)]
    (slowest,) = all_reduce_max([median(times)], ctx.world, ctx.device)
    return slowest
