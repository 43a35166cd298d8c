"""plan.json: what the planner says of this attempt before its first step, so that the report can hold it against what happened.

A forecast is a courtesy. Where the planner cannot make one it says why, and the run goes on.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import RunConfig
from dist_llm.engine.run_dir import Start
from dist_llm.parallel.divide import grid_of
from dist_llm.planning.cluster import Cluster, load_cluster
from dist_llm.planning.forecast import cluster_of_gpu, forecast_memory, forecast_time, forecast_traffic, measured_cluster
from dist_llm.utils.errors import StorageError
from dist_llm.utils.files import write_json

__all__ = ["MACHINE_FILE", "PLAN_FILE", "write_forecast"]

PLAN_FILE = "plan.json"
MACHINE_FILE = "machine.yaml"  # in the run directory: the machine as `dist-llm bench machine --out` measured it


def write_forecast(
    config: RunConfig,
    ctx: ParallelContext,
    note: Callable[[str], None],
    *,
    plain: bool,
    attempt: int,
    start: Start,
    peak: float | None,
    peak_sum: float | None,
) -> None:
    """Write ``plan.json`` of an attempt; call it on the main rank, right before the engine is built.

    Args:
        config: the run.
        ctx: where this rank stands.
        note: is told when the file cannot be written; that is no reason to stop a run.
        plain: the plain engine trains.
        attempt: number of the attempt.
        start: where it begins.
        peak: FLOP/s of this rank's device, from ``engine/peak.py``. peak_sum: of all devices together. None: unknown.
    """
    on_gpu = ctx.device.type == "cuda"
    ranks = ctx.world.size
    run_dir = Path(config.directory)
    plan: dict[str, Any] = {
        "attempt": attempt,
        "start_step": start.step,
        "ranks": ranks,
        "engine": "plain" if plain else "deepspeed",
        "device": torch.cuda.get_device_name(ctx.device) if on_gpu else "cpu",
        "time": _or_reason(lambda: _time(config, ctx, run_dir, plain=plain, peak=peak, peak_sum=peak_sum)),
        "memory": _or_reason(lambda: forecast_memory(config, ranks, plain=plain, on_gpu=on_gpu)),
    }
    if not plain and ranks > 1:
        plan["traffic"] = _or_reason(lambda: forecast_traffic(config, grid_of(config.parallel, ranks), ctx.world.rank))
    plan["memory"]["measured_as"] = "allocated" if on_gpu else "resident"
    if not on_gpu:
        plan["memory"] |= {"baseline_bytes": _resident_bytes(), "baseline_peak_bytes": _resident_peak_bytes()}
    try:
        write_json(run_dir / PLAN_FILE, plan)
    except StorageError as error:
        note(f"no forecast for the report: {error}")


def _or_reason(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    # The planner refuses with ValueError, of which a user's errors are a kind.
    try:
        return make()
    except ValueError as error:
        return {"reason": str(error)}


def _time(
    config: RunConfig, ctx: ParallelContext, run_dir: Path, *, plain: bool, peak: float | None, peak_sum: float | None
) -> dict[str, Any]:
    cluster, rates = _cluster(config, ctx, run_dir, peak)
    return {**forecast_time(config, ctx.world.size, cluster, plain=plain, peak_flops=peak_sum), "rates": rates}


def _cluster(config: RunConfig, ctx: ParallelContext, run_dir: Path, peak: float | None) -> tuple[Cluster, str]:
    """The rates to plan with, and where they come from."""
    named = run_dir / MACHINE_FILE
    if named.exists():
        return load_cluster(str(named)), f"{MACHINE_FILE} of the run directory"
    if ctx.device.type == "cuda":
        memory = torch.cuda.get_device_properties(ctx.device).total_memory
        cluster = cluster_of_gpu(torch.cuda.get_device_name(ctx.device), memory)
        return cluster, f"configs/clusters/{cluster.name}.yaml"
    if peak is None:
        raise ValueError("the rate of matrix products on this device is not known")
    measured = measured_cluster(load_cluster("cpu"), config, peak, per_node=ctx.local_size)
    return measured, f"configs/clusters/cpu.yaml, with matrix products at the {peak / 1e9:.0f} GFLOP/s measured at the start"


def _resident_bytes() -> int | None:
    # What the process holds now. Linux only, as is the peak's unit; elsewhere the report leaves the comparison out.
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _resident_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
