"""What one rank's device does by itself, while the other ranks of the machine do the same: products, memory, attention, dispatch.

All times are medians of wall time: what a run gets, neighbours included, rather than the best moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from dist_llm.comm.collectives import barrier
from dist_llm.comm.context import ParallelContext
from dist_llm.kernels.table import choices

__all__ = ["Shape", "measure_rates", "seconds_of"]

Shape = tuple[int, int, int]  # rows of activations, outputs, inputs: (m, k) @ (k, n)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of layers that such a device trains: square and wide, and small ones, where the edges of a product cost most.
_SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": ((1024, 256, 256), (1024, 1024, 256), (1024, 256, 1024), (1024, 512, 512), (2048, 1024, 512), (1024, 1024, 1024)),
    "cuda": ((4096, 2048, 2048), (8192, 4096, 4096), (8192, 16384, 4096), (8192, 4096, 16384), (16384, 8192, 8192)),
}
_PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}
_COPY_BYTES = {"cpu": (1 << 20, 16 << 20, 128 << 20), "cuda": (16 << 20, 256 << 20, 1 << 30)}  # the last beyond every cache
_ATTENTION = {"cpu": (1, 1024, 4, 64), "cuda": (4, 4096, 16, 128)}  # rows, tokens, heads, head size
_SHRINK = 8  # `tiny` measures sizes this much smaller: tests
_LEAST_S = 2e-3  # a timed stretch is at least this long: shorter ones are the clock's and the scheduler's
_MIN_STRETCHES = 3


def seconds_of(op: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Median seconds of ``op``, called again and again for about ``seconds``."""
    op()  # the first call pays for memory, threads and choosing a kernel
    start = _now(device)
    op()
    calls = max(1, min(1000, int(_LEAST_S / max(1e-7, _now(device) - start))))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _MIN_STRETCHES or time.perf_counter() < end:
        start = _now(device)
        for _ in range(calls):
            op()
        times.append((_now(device) - start) / calls)
    return median(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_rates(ctx: ParallelContext, *, seconds: float, tiny: bool = False) -> dict[str, Any]:
    """Time this rank's device; every rank calls this, and they work at the same time.

    Args:
        ctx: where this rank stands.
        seconds: for each size.
        tiny: sizes for a test.

    Returns:
        ``{"launch_s", "gemm": [{"precision", "m", "n", "k", "s"}], "copy": [{"bytes", "s"}], "attention": {"rows", "tokens", "heads",
        "head_dim", "implementation", "forward_s", "backward_s"}}``. ``bytes`` of a copy are those read and those written together.
    """
    device, kind, by = ctx.device, ctx.device.type, _SHRINK if tiny else 1

    def timed(op: Callable[[], Any]) -> float:
        barrier(ctx.world, device)
        return seconds_of(op, device, seconds)

    one = torch.zeros(1, device=device)
    launch_s = timed(lambda: one.add_(1))
    products = []
    for precision in _PRECISIONS[kind]:
        for m, n, k in ((m // by, n // by, k // by) for m, n, k in _SHAPES[kind]):
            a = torch.randn(m, k, device=device).to(_DTYPES[precision])
            b = torch.randn(n, k, device=device).to(_DTYPES[precision])
            products.append({"precision": precision, "m": m, "n": n, "k": k, "s": timed(partial(torch.nn.functional.linear, a, b))})
    copies = []
    for size in (size // by for size in _COPY_BYTES[kind]):
        source, target = (torch.ones(size // 4, device=device) for _ in range(2))
        copies.append({"bytes": 2 * size, "s": timed(partial(target.copy_, source))})
    return {"launch_s": launch_s, "gemm": products, "copy": copies, "attention": _attention(ctx, timed, by)}


def _attention(ctx: ParallelContext, timed: Callable[[Callable[[], Any]], float], by: int) -> dict[str, Any]:
    rows, tokens, heads, head_dim = _ATTENTION[ctx.device.type]
    tokens //= by
    chosen = choices(ctx.device, torch.bfloat16, {})["attention"]
    q, k, v = (torch.randn(rows, tokens, heads, head_dim, device=ctx.device).bfloat16().requires_grad_() for _ in range(3))

    def forward() -> torch.Tensor:
        return chosen.fn(q, k, v, causal=True, doc_ids=None, scale=head_dim**-0.5)

    upstream = torch.ones_like(forward())

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), upstream)

    with torch.no_grad():
        forward_s = timed(forward)
    both_s = timed(both)
    return {
        "rows": rows, "tokens": tokens, "heads": heads, "head_dim": head_dim, "implementation": chosen.name,
        "forward_s": forward_s, "backward_s": max(0.0, both_s - forward_s),
    }  # fmt: skip
