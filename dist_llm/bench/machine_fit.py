"""From curves to a cluster description: the figures with which the planner's own formulas come closest to what was measured.

``planning.roofline`` and ``planning.collectives`` say how a time follows from a description; here they are turned round. So the
figures are those of these formulas, not of a data sheet: a memory bandwidth is written as what its usual fraction would give.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from scipy.optimize import minimize

from dist_llm.planning.cluster import Cluster, load_cluster
from dist_llm.planning.collectives import Span, all_gather, all_reduce, point_to_point
from dist_llm.planning.roofline import MEMORY_FRACTION, attention_seconds, gemm_seconds

__all__ = ["fit_machine", "link_seconds"]

_TEMPLATE = "cpu"  # whose links stand in for what one machine, or one rank, cannot measure


def fit_machine(
    measured: dict[str, Any], *, ranks: int, device: str, generation: str, multiprocessors: int, memory_bytes: float
) -> tuple[dict[str, Any], dict[str, float]]:
    """Values of a cluster description, and by measurement the typical factor between described and measured times.

    Puts ``described_s`` into every point of ``measured["gemm"]`` and ``measured["links"]``.

    Args:
        measured: answer of ``machine.machine_program``.
        ranks: devices of the machine.
        device, generation, multiprocessors, memory_bytes: of one device.
    """
    cluster = replace(
        load_cluster(_TEMPLATE),
        multiprocessors=multiprocessors,
        matmul_fraction=1.0,
        memory_bandwidth=measured["copy"][-1]["bytes"] / measured["copy"][-1]["s"] / MEMORY_FRACTION,
        gpus_per_node=ranks,
        link_efficiency=1.0,
        launch=measured["launch_s"],
        clock_fraction=1.0,
    )
    cluster = replace(cluster, peaks=_peaks(measured["gemm"], cluster))
    forward, backward = _attention_shares(measured["attention"], cluster)
    if measured["links"]:
        bandwidth, latency = _fit_links(measured["links"], ranks, cluster)
        cluster = replace(cluster, nvlink_bandwidth=bandwidth, nvlink_latency=latency)
    for point in measured["gemm"]:
        point["described_s"] = gemm_seconds(point["m"], point["n"], point["k"], cluster, point["precision"])
    for point in measured["links"]:
        point["described_s"] = link_seconds(point, ranks, cluster)
    groups = {"products": measured["gemm"], "collectives": measured["links"]}
    fit = {name: math.exp(fmean(abs(math.log(p["described_s"] / p["s"])) for p in points)) for name, points in groups.items() if points}
    values = {
        "name": "machine",
        "device": device,
        "generation": generation,
        "memory_gb": _digits(memory_bytes / 1e9),
        "peak_tflops": {precision: _digits(rate / 1e12) for precision, rate in cluster.peaks},
        "matmul_fraction": 1.0,
        "multiprocessors": multiprocessors,
        "memory_gb_per_s": _digits(cluster.memory_bandwidth / 1e9),
        "gpus_per_node": ranks,
        "nvlink_gb_per_s": _digits(cluster.nvlink_bandwidth / 1e9),
        "network_gb_per_s": _digits(cluster.network_bandwidth / 1e9),
        "attention": {"forward": _digits(forward), "backward": _digits(backward)},
        "link_efficiency": 1.0,
        "nvlink_latency_us": _digits(cluster.nvlink_latency * 1e6),
        "network_latency_us": _digits(cluster.network_latency * 1e6),
        "launch_us": _digits(cluster.launch * 1e6),
    }
    return values, fit


def _peaks(points: list[dict[str, Any]], cluster: Cluster) -> tuple[tuple[str, float], ...]:
    """By precision, the rate that makes the formula right for the median shape."""
    peaks = []
    for precision in dict.fromkeys(point["precision"] for point in points):
        # A device of 1 FLOP/s whose memory and dispatch take no time: what is left is the work, losses by shape included.
        unit = replace(cluster, peaks=((precision, 1.0),), memory_bandwidth=math.inf, launch=0.0)
        own = [p for p in points if p["precision"] == precision]
        rates = [gemm_seconds(p["m"], p["n"], p["k"], unit, precision) / _without_launch(p["s"], cluster) for p in own]
        peaks.append((precision, median(rates)))
    return tuple(peaks)


def _without_launch(seconds: float, cluster: Cluster) -> float:
    # A tiny op takes hardly longer than dispatching it; at least half of its time is its own.
    return max(seconds - cluster.launch, seconds / 2)


def _attention_shares(point: dict[str, Any], cluster: Cluster) -> tuple[float, float]:
    perfect = replace(cluster, attention_forward=1.0, attention_backward=1.0, launch=0.0)
    shares = []
    for backward, seconds in ((False, point["forward_s"]), (True, point["backward_s"])):
        work = attention_seconds(
            point["rows"], point["tokens"], point["heads"], point["head_dim"], perfect, kernel=1.0, backward=backward, precision="bf16"
        )
        # The description's range; a backward too fast to time beside its forward counts as perfect.
        shares.append(min(1.0, work / _without_launch(seconds, cluster)) if seconds > 0 else 1.0)
    return shares[0], shares[1]


def link_seconds(point: dict[str, Any], ranks: int, cluster: Cluster) -> float:
    """What the planner says ``point`` takes: a collective of ``machine_links`` between ``ranks`` ranks of one machine."""
    size, inside = point["bytes"], Span(ranks, ranks)
    if point["collective"] == "send":
        return point_to_point(size, across_nodes=False, cluster=cluster)
    return all_reduce(size, inside, cluster) if point["collective"] == "all_reduce" else all_gather(size, inside, cluster)


def _fit_links(points: list[dict[str, Any]], ranks: int, cluster: Cluster) -> tuple[float, float]:
    """Bandwidth and latency with the smallest mean |log| between formula and measurement: relative errors of small and large alike."""

    def error(logs: Any) -> float:
        tried = replace(cluster, nvlink_bandwidth=math.exp(logs[0]), nvlink_latency=math.exp(logs[1]))
        return fmean(abs(math.log(link_seconds(p, ranks, tried) / p["s"])) for p in points)

    largest, smallest = max(points, key=lambda p: p["bytes"]), min(points, key=lambda p: p["s"])
    start = [math.log(largest["bytes"] / largest["s"]), math.log(smallest["s"])]
    found = minimize(error, start, method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-6, "maxiter": 2000})
    return math.exp(found.x[0]), math.exp(found.x[1])


def _digits(value: float) -> float:
    """Three significant digits, which is more than a measurement repeats to."""
    return float(f"{value:.3g}")
