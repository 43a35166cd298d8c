"""What the planner says of one run on given ranks: time, memory and traffic of a step, in plain numbers for ``plan.json``.

Each part answers with numbers, or with ``{"reason": ...}`` where no honest number can be given. Nothing here runs anything; the engine
adds what it has measured (``engine/forecast.py``), and the report sets both beside what happened (``report/forecast.py``).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from dist_llm.config.schema import RunConfig
from dist_llm.planning.calibration import CALIBRATION, calibration_of
from dist_llm.planning.cluster import Cluster, cluster_names, load_cluster
from dist_llm.planning.communication import step_traffic
from dist_llm.planning.count import flops_per_token
from dist_llm.planning.memory import layout_of, rank_bytes
from dist_llm.planning.roofline import gemm_seconds
from dist_llm.planning.shapes import from_config
from dist_llm.planning.trainer_step import trainer_step
from dist_llm.topology.grid import RankGrid
from dist_llm.utils.errors import ConfigError

__all__ = ["cluster_of_gpu", "forecast_memory", "forecast_time", "forecast_traffic", "measured_cluster"]

_OTHER_BOARDS = {"pcie", "nvl", "mig"}  # lower power limits or a part of a device: the descriptions are of SXM boards
_GIB_OVER_GB = 1.0625  # a data sheet's 80 GB are 80 GiB less a reserve, 85e9 bytes
_MEMORY_TOLERANCE = 0.1  # between the kinds of one family, 40 and 80 GB or 80 and 96 GB
# Below this a micro-batch on a CPU is mostly Python, dispatch and DeepSpeed's bookkeeping, which the time model does not count: the
# tiny model took 1.4 times (plain) and 3.2 times (two ranks) as long as predicted at 7 and 5 ms, 0.75 times at 0.6 and 2 s.
_LEAST_MICRO_S = 0.05
_STEP_PARTS = ("compute_s", "tp_comm_s", "cp_comm_s", "pp_comm_s", "dp_comm_s", "bubble_s", "optimizer_s", "straggler_s")
_MEMORY_PARTS = ("parameters", "gradients", "masters", "optimizer", "activations", "logits", "buffers", "slack")


def cluster_of_gpu(name: str, memory_bytes: float) -> Cluster:
    """The description in ``configs/clusters`` of a GPU, by the driver's name for it and the bytes it has.

    Args:
        name: for example ``NVIDIA A100-SXM4-80GB``.
        memory_bytes: as the driver counts them; they tell the kinds of one family apart.

    Raises:
        ConfigError: none describes it.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if not words & _OTHER_BOARDS:
        family = [load_cluster(stem) for stem in cluster_names() if stem.partition("-")[0] in words]
        fits = {abs(memory_bytes / (cluster.memory_bytes * _GIB_OVER_GB) - 1): cluster for cluster in family}
        if fits and min(fits) <= _MEMORY_TOLERANCE:
            return fits[min(fits)]
    raise ConfigError(
        f"no cluster description is of the device '{name}' with {memory_bytes / 1e9:.0f} GB; there are {', '.join(cluster_names())}. "
        "Measure it with `dist-llm bench machine --out RUN/machine.yaml`, RUN being the run directory"
    )


def measured_cluster(base: Cluster, config: RunConfig, rate: float, *, per_node: int) -> Cluster:
    """A CPU at the rate that a large matrix product reached on the rank itself.

    The time model takes losses of tiles and pipelines off the rate of narrow products, which are a GPU's: a CPU's library reaches
    nearly the same rate on all but the narrowest. The peak is set so that, losses included, the products of the run's own MLP go at
    ``rate``. Attention, of which the description has the bf16 figure, is bound by exponentials and memory and is taken to be as fast in
    fp32, at most as fast as products; it is scaled with ``rate`` as the rest is.

    Args:
        base: gives everything else.
        config: the run, whose widths and precision count.
        rate: FLOP/s.
        per_node: ranks that share the fast links.
    """
    model, tokens = config.model, config.train.micro_batch_size * config.data.seq_len // config.parallel.cp
    d, ffn = model.d_model, model.ffn_size // config.parallel.tp
    # At one FLOP/s nothing but the arithmetic counts: FLOPs over modelled seconds are the share of the peak that products reach.
    slow = replace(base, peaks=((config.precision, 1.0),), launch=0.0)
    products = ((tokens, ffn, d), (tokens, d, ffn), (d, ffn, tokens))  # forward, the input's gradient, the weight's
    share = sum(2.0 * m * n * k for m, n, k in products) / sum(gemm_seconds(m, n, k, slow, config.precision) for m, n, k in products)
    peak = rate / share
    faster = rate / (base.matmul_fraction * base.peak(config.precision))  # than the described device
    forward, backward = (
        min(fraction * base.peak("bf16") * faster, rate) / peak for fraction in (base.attention_forward, base.attention_backward)
    )
    return replace(base, peaks=((config.precision, peak),), gpus_per_node=per_node, attention_forward=forward, attention_backward=backward)


def forecast_time(config: RunConfig, ranks: int, cluster: Cluster, *, plain: bool, peak_flops: float | None) -> dict[str, Any]:
    """Seconds of a step with their interval and parts, and MFU where ``peak_flops`` is known.

    Args:
        config: the run.
        ranks: of the launch.
        cluster: rates of a device and of the links.
        plain: the plain engine.
        peak_flops: FLOP/s of all devices together, the one that measured MFU is held against.

    Raises:
        ValueError: the planner cannot describe the layout or the precision.
    """
    parallel = config.parallel
    if not plain and (parallel.offload_optimizer != "none" or parallel.offload_parameters != "none"):
        return {"reason": "the run offloads to the host, and the time model has no link between device and host"}
    model, layout = from_config(config.model, config.data.seq_len), layout_of(config, ranks, plain=plain)
    step = trainer_step(model, layout, cluster)
    micro_s = step.total_s / layout.num_micro
    if cluster.generation not in CALIBRATION and micro_s < _LEAST_MICRO_S:
        return {
            "reason": f"a micro-batch computes for about {micro_s * 1e3:.1f} ms; below {_LEAST_MICRO_S * 1e3:.0f} ms the host's own work, "
            "which the time model does not count, decides"
        }
    answer: dict[str, Any] = {
        "step_s": step.total_s,
        "low_s": step.low_s,
        "high_s": step.high_s,
        "parts": {name.removesuffix("_s"): getattr(step, name) for name in _STEP_PARTS},
        "cluster": cluster.name,
        "notes": [],
    }
    if cluster.generation not in CALIBRATION:
        spread = calibration_of(cluster.generation).spread
        answer["notes"].append(f"no published run calibrates {cluster.device}: the interval, a log error of {spread:g}, is a guess")
    if peak_flops:
        flops = config.train.batch_size * config.data.seq_len * flops_per_token(config.model, config.data.seq_len)
        for name, seconds in (("mfu", step.total_s), ("mfu_low", step.high_s), ("mfu_high", step.low_s)):
            answer[name] = flops / (seconds * peak_flops)
    return answer


def forecast_memory(config: RunConfig, ranks: int, *, plain: bool, on_gpu: bool) -> dict[str, Any]:
    """Bytes of the fullest rank by part, and the sum of those that the measured figure contains.

    On a GPU that figure is the tensors' (``max_memory_allocated``), without context and unused parts of the allocator. On a CPU it is what the
    process grew by: DeepSpeed's buckets are then address space that is touched only as far as it is used, and do not count.

    Raises:
        ValueError: the planner cannot describe the layout.
    """
    rank = rank_bytes(config, ranks, plain=plain, device="cuda" if on_gpu else "cpu")
    parts = {name: getattr(rank, name) for name in _MEMORY_PARTS}
    left_out = {"slack": "context and allocator, which the measured figure does not contain"}
    if not on_gpu and not plain and config.parallel.zero > 0:
        left_out["buffers"] = "DeepSpeed's buckets, of which a CPU touches only what it uses"
    return {
        "bytes": sum(size for name, size in parts.items() if name not in left_out),
        "parts": parts,
        "left_out": left_out,
        "stage": rank.stage,
    }


def forecast_traffic(config: RunConfig, grid: RankGrid, rank: int) -> dict[str, Any]:
    """Bytes that ``rank`` sends in a step by the ring figure, in all and by group: what ``comm_bytes`` counts.

    Raises:
        ValueError: the batch or the model does not divide.
    """
    groups: dict[str, float] = {}
    for (group, _), traffic in sorted(step_traffic(config, grid, rank).items()):
        groups[group] = groups.get(group, 0.0) + float(traffic.wire_bytes)
    return {"bytes": sum(groups.values()), "groups": groups}
