"""A measured machine as a cluster description: the YAML file that ``planning.cluster.load_cluster`` reads, with what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dist_llm.planning.cluster import load_cluster
from dist_llm.utils.files import write_atomic

__all__ = ["machine_yaml", "write_machine"]


def write_machine(path: Path, answer: dict[str, Any]) -> None:
    """Write the answer of ``machine.measure_machine`` to ``path``, and check that it loads.

    Raises:
        StorageError: it cannot be written.
        ConfigError: a figure is out of a description's range; the file stays, to be looked at.
    """
    write_atomic(path, machine_yaml(answer))
    load_cluster.cache_clear()  # a description of that path may have been read before
    load_cluster(str(path))


def machine_yaml(answer: dict[str, Any]) -> str:
    """The text of the file: how it was made, the figures, and the curves as comments."""
    measured = answer["measured"]
    links = (
        f"Links between ranks: {answer['backend']}, fitted to the collectives below."
        if measured["links"]
        else "Links between ranks: not measured with one rank, an order of magnitude."
    )
    head = [
        f"{answer['device']}, {answer['ranks']} at once on one machine, measured {answer['when']} by `dist-llm bench machine` with torch {answer['torch']}.",
        "Rates are those with which the planner's formulas come closest to the measured times, so matmul_fraction and link_efficiency are 1.",
        links,
        "Network: not measured, one 10 Gb/s port a rank is assumed; put your own figure.",
    ]
    curves = [f"products, GFLOP/s: {_products(measured['gemm'])}"]
    curves.append("copies, GB/s: " + ", ".join(f"{c['bytes'] / 2e6:.3g} MB {c['bytes'] / c['s'] / 1e9:.3g}" for c in measured["copy"]))
    attention = measured["attention"]
    curves.append(
        f"attention ({attention['implementation']}): {attention['rows']} x {attention['tokens']} tokens, {attention['heads']} heads of "
        f"{attention['head_dim']}: forward {1e3 * attention['forward_s']:.3g} ms, backward {1e3 * attention['backward_s']:.3g} ms"
    )
    for collective in dict.fromkeys(point["collective"] for point in measured["links"]):
        own = [p for p in measured["links"] if p["collective"] == collective]
        curves.append(f"{collective}, us: " + ", ".join(f"{p['bytes'] / 1e3:.4g} kB {1e6 * p['s']:.3g}" for p in own))
    body = yaml.safe_dump(answer["cluster"], sort_keys=False, default_flow_style=None, width=140)
    return _comment(head) + body + "# Measured:\n" + _comment(curves)


def _products(points: list[dict[str, Any]]) -> str:
    return ", ".join(f"{p['precision']} {p['m']}x{p['n']}x{p['k']} {2e-9 * p['m'] * p['n'] * p['k'] / p['s']:.3g}" for p in points)


def _comment(lines: list[str]) -> str:
    return "".join(f"# {line}\n" for line in lines)
