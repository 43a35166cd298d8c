"""Time of a collective on the links between its ranks: rings and trees, inside a node and across nodes.

A ring moves (n-1)/n of the whole message through every rank once (all-gather, reduce-scatter) or twice (all-reduce); see Thakur,
Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH" (2005). Across nodes a ring enters every
node as often as the group has ranks there, each on a network port of its own, so a group's rate over the network is its ranks in
a node times the port's rate. Latency: a hop per rank for a ring, two a level for a tree (the double trees of NCCL 2.4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_llm.planning.cluster import Cluster

__all__ = ["Span", "all_gather", "all_reduce", "all_to_all", "point_to_point", "span"]


@dataclass(frozen=True)
class Span:
    """How a group lies over the nodes: ``size`` ranks, ``per_node`` of them in one."""

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Nodes the group touches."""
        return -(-self.size // self.per_node)


def span(size: int, stride: int, gpus_per_node: int) -> Span:
    """The span of a group of ``size`` ranks whose neighbours are ``stride`` global ranks apart."""
    return Span(size, max(1, min(size, gpus_per_node // stride)))


def all_gather(num_bytes: float, group: Span, cluster: Cluster) -> float:
    """Seconds until every rank has the ``num_bytes`` of all ranks together; a reduce-scatter takes as long."""
    n = group.size
    if n == 1:
        return 0.0
    return num_bytes * (n - 1) / n / _ring_rate(group, cluster) + _ring_latency(group, cluster)


def all_reduce(num_bytes: float, group: Span, cluster: Cluster) -> float:
    """Seconds to sum ``num_bytes`` that each rank holds: the faster of a ring (twice an all-gather) and a double tree."""
    n = group.size
    if n == 1:
        return 0.0
    ring = 2 * all_gather(num_bytes, group, cluster)
    levels = 2 * math.ceil(math.log2(n))
    hop = cluster.network_latency if group.nodes > 1 else cluster.nvlink_latency
    tree = 2 * num_bytes / _ring_rate(group, cluster) + levels * hop
    return min(ring, tree)


def all_to_all(num_bytes: float, group: Span, cluster: Cluster, *, once_a_node: float = 1.0) -> float:
    """Seconds until each rank has sent ``num_bytes``, an equal part to every rank (its own part stays).

    once_a_node: share of the traffic between nodes that is left when a row that several ranks of a node want crosses once.
    """
    n = group.size
    if n == 1:
        return 0.0
    inside = num_bytes * (group.per_node - 1) / n / (cluster.nvlink_bandwidth * cluster.link_efficiency)
    outside = once_a_node * num_bytes * (n - group.per_node) / n / (cluster.network_bandwidth * cluster.network_efficiency)
    latency = cluster.network_latency if group.nodes > 1 else cluster.nvlink_latency
    return max(inside, outside) + latency * math.ceil(math.log2(n))


def point_to_point(num_bytes: float, *, across_nodes: bool, cluster: Cluster) -> float:
    """Seconds to send ``num_bytes`` to a rank of the same node or of another."""
    if across_nodes:
        return num_bytes / (cluster.network_bandwidth * cluster.network_efficiency) + cluster.network_latency
    return num_bytes / (cluster.nvlink_bandwidth * cluster.link_efficiency) + cluster.nvlink_latency


def _ring_rate(group: Span, cluster: Cluster) -> float:
    inside = cluster.nvlink_bandwidth * cluster.link_efficiency
    if group.nodes == 1:
        return inside
    outside = group.per_node * cluster.network_bandwidth * cluster.network_efficiency
    return min(inside, outside) if group.per_node > 1 else outside


def _ring_latency(group: Span, cluster: Cluster) -> float:
    between = group.nodes if group.nodes > 1 else 0
    return between * cluster.network_latency + (group.size - 1 - max(0, between - 1)) * cluster.nvlink_latency
