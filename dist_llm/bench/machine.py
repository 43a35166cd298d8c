"""``bench machine``: what this machine's devices and the links between them do, for the planner to be asked about it.

A device is what one rank has: a GPU, or an equal share of the cores. All ranks measure at the same time, since that is how they
will train: cores of one socket share its memory.
"""

from __future__ import annotations

import os
import platform
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from dist_llm.bench.machine_fit import fit_machine
from dist_llm.bench.machine_links import SIZES, measure_links
from dist_llm.bench.machine_rates import measure_rates
from dist_llm.comm.collectives import gather_json
from dist_llm.comm.context import ParallelContext
from dist_llm.engine.launch import close_context, open_context
from dist_llm.engine.ranks import Launch
from dist_llm.parallel.ranks import run_on_ranks
from dist_llm.utils.errors import ConfigError

__all__ = ["machine_as_text", "machine_program", "measure_machine"]

_DEADLINE_S = 300.0
_GENERATIONS = {7: "volta", 8: "ampere", 9: "hopper", 10: "blackwell", 12: "blackwell"}  # of a CUDA compute capability


def measure_machine(launch: Launch, *, ranks: int | None, seconds: float, tiny: bool = False) -> dict[str, Any]:
    """Measure this machine.

    Args:
        launch: the ranks that a launcher has started; a process alone forks ``ranks`` CPU ranks itself.
        ranks: default 2 on CPU where there are two cores, else 1.
        seconds: for each size of each measurement.
        tiny: sizes for a test.

    Returns:
        ``{"case", "when", "host", "device", "backend", "ranks", "threads", "torch", "took_s", "measured", "cluster", "fit"}``: the curves,
        the values of a cluster description, and by measurement how far the description is from the curves.

    Raises:
        ConfigError: several ranks on GPUs that no launcher has started, or more ranks than cores.
    """
    has_gpu, cores = torch.cuda.is_available(), len(os.sched_getaffinity(0))
    start = time.perf_counter()
    if launch.world_size > 1 or has_gpu:
        if launch.world_size == 1 and ranks is not None and ranks > 1:
            raise ConfigError(
                f"--ranks {ranks}: ranks on GPUs are started by a launcher: deepspeed --num_gpus {ranks} --module dist_llm bench machine"
            )
        ctx = open_context(launch, needs_process_group=launch.world_size > 1)
        try:
            measured = machine_program(ctx, seconds, tiny)
        finally:
            close_context()
        count = launch.world_size
    else:
        count = ranks if ranks is not None else min(2, cores)
        if count > cores:
            raise ConfigError(f"--ranks {count}: this machine has {cores} cores, and ranks that share one measure each other; use {cores}")
        measured = run_on_ranks(machine_program, dp=count, args=(seconds, tiny), threads=cores // count, deadline_s=_DEADLINE_S)[0]
    device = torch.cuda.get_device_name() if has_gpu else f"{measured['threads']} core(s) of {_cpu_name()}"
    answer: dict[str, Any] = {
        "case": "machine",
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "host": platform.node(),
        "device": device,
        "backend": "nccl" if has_gpu else "gloo",
        "ranks": count,
        "threads": measured["threads"],
        "torch": torch.__version__,
        "measured": measured,
    }
    cluster, fit = fit_machine(
        measured,
        ranks=count,
        device=device if has_gpu else "CPU share",
        generation=_GENERATIONS.get(torch.cuda.get_device_capability()[0], "gpu") if has_gpu else "cpu",
        multiprocessors=torch.cuda.get_device_properties(0).multi_processor_count if has_gpu else 1,
        memory_bytes=torch.cuda.get_device_properties(0).total_memory if has_gpu else _host_memory() / count,
    )
    return {**answer, "cluster": cluster, "fit": fit, "took_s": time.perf_counter() - start}


def machine_program(ctx: ParallelContext, seconds: float, tiny: bool = False) -> dict[str, Any]:
    """What runs on every rank: its device, then the links. Times of devices are the mean over ranks; the same answer on every rank."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch renames collectives
    each = gather_json(measure_rates(ctx, seconds=seconds, tiny=tiny), ctx.world, ctx.device)
    rates = _mean(each)
    sizes = SIZES[:2] if tiny else SIZES
    # Ranks whose number does not divide a power of two get the next size that they divide.
    per_element = 4 * ctx.world.size
    links = measure_links(ctx, seconds=seconds, sizes=[-(-size // per_element) * per_element for size in sizes])
    return {**rates, "links": links, "threads": torch.get_num_threads()}


def _mean(answers: list[Any]) -> Any:
    """The mean of every number that may differ between ranks, which are floats; what is the same for all stays."""
    first = answers[0]
    if isinstance(first, dict):
        return {key: _mean([answer[key] for answer in answers]) for key in first}
    if isinstance(first, list):
        return [_mean([answer[i] for answer in answers]) for i in range(len(first))]
    return fmean(answers) if isinstance(first, float) else first


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def _host_memory() -> float:
    """Bytes of memory of this machine, or of this process's share of it where a container says one."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:  # no control group, or an older kind
        return total
    return min(total, float(limit)) if limit.isdigit() else total


def machine_as_text(answer: dict[str, Any]) -> str:
    """The answer of ``measure_machine`` for a person: each measurement, and what the written description makes of it."""
    measured = answer["measured"]
    lines = [f"{answer['ranks']} rank(s) at once, each {answer['device']}; torch {answer['torch']}; {answer['took_s']:.0f} s"]
    lines.append("matrix products                        measured    described")
    for point in measured["gemm"]:
        flops = 2.0 * point["m"] * point["n"] * point["k"]
        what = f"  {point['precision']} {point['m']} x {point['n']} x {point['k']}"
        lines.append(f"{what:<36}{flops / point['s'] / 1e9:>10.0f} {flops / point['described_s'] / 1e9:>10.0f}  GFLOP/s")
    lines.append("memory copies, read and written")
    lines += [f"  {c['bytes'] / 2e6:>9.1f} MB{'':<23}{c['bytes'] / c['s'] / 1e9:>10.1f}  GB/s" for c in measured["copy"]]
    attention, shares = measured["attention"], answer["cluster"]["attention"]
    lines.append(
        f"attention ({attention['implementation']}, {attention['tokens']} tokens): forward {1e3 * attention['forward_s']:.2f} ms, backward "
        f"{1e3 * attention['backward_s']:.2f} ms; {100 * shares['forward']:.0f} % and {100 * shares['backward']:.0f} % of the products' rate"
    )
    lines.append(f"an operation on one number: {1e6 * measured['launch_s']:.1f} us")
    if measured["links"]:
        lines.append(f"collectives ({answer['backend']})                     measured    described")
        for p in measured["links"]:
            lines.append(
                f"  {p['collective']:<15}{p['bytes'] / 1e3:>10.0f} kB{'':<7}{1e6 * p['s']:>10.0f} {1e6 * p['described_s']:>10.0f}  us"
            )
    fit = answer["fit"]
    lines.append("described over measured, typical factor: " + ", ".join(f"{name} {factor:.2f}" for name, factor in fit.items()))
    return "\n".join(lines)
