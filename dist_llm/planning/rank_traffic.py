"""A rank's weights, and the seconds of what is done with all of them once a step or micro-batch: sums, gathers, the optimiser."""

from __future__ import annotations

from dist_llm.planning.cluster import Cluster
from dist_llm.planning.collectives import all_gather, all_reduce, span
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.overlap import exposed_seconds
from dist_llm.planning.roofline import memory_seconds
from dist_llm.planning.shapes import ModelShape
from dist_llm.planning.software import Software
from dist_llm.planning.stage_split import stage_layers

__all__ = ["optimizer_seconds", "rank_weights", "reduction_seconds", "zero3_seconds"]

# AdamW on fp32 masters and moments: reads gradient, master and moments (16), writes master and moments (12) and the working copy
# (2), after a pass over the gradient to clip it (4).
OPTIMIZER_BYTES = 34.0


def rank_weights(model: ModelShape, layout: LayoutShape) -> tuple[float, float]:
    """(matrix elements outside experts, those of experts) on a rank of the fullest stage, before ZeRO divides them."""
    most, _ = stage_layers(model.num_layers, layout.pp)
    share = model.moe_layers / model.num_layers
    shared = model.shared_experts * model.expert_weights + model.router_weights
    dense = most * (model.attention_weights + (1 - share) * model.mlp_weights + share * shared)
    tables = 1 if model.tied or layout.pp > 1 else 2  # embedding and head lie on different stages
    experts = most * share * model.num_experts * model.expert_weights / layout.ep
    return (dense + tables * model.head_weights) / layout.tp, experts


def zero3_seconds(model: ModelShape, layout: LayoutShape, software: Software, cluster: Cluster) -> float:
    """ZeRO-3 in one micro-batch: weights gathered layer by layer for forward and for backward, gradients reduce-scattered."""
    dense, experts = rank_weights(model, layout)
    group = span(layout.shard_ranks, layout.tp, cluster.gpus_per_node)
    units = -(-model.num_layers // layout.pp) + 1  # the embedding and head are a unit
    each = dense / units
    total = units * (2 * all_gather(2.0 * each, group, cluster) + all_gather(software.grad_bytes * each, group, cluster))
    if experts:
        copies = span(_expert_copies(layout), layout.ep, cluster.gpus_per_node)
        each = experts / units
        total += units * (2 * all_gather(2.0 * each, copies, cluster) + all_gather(software.grad_bytes * each, copies, cluster))
    return total


def reduction_seconds(model: ModelShape, layout: LayoutShape, software: Software, cluster: Cluster, micro_s: float) -> float:
    """Exposed seconds of what data-parallel ranks exchange once a step.

    ZeRO 0 all-reduces gradients behind the last backward; ZeRO 1 and 2 reduce-scatter them there and gather the new weights behind
    the next forward; hybrid sharding sums the shards of its replicas. micro_s: a micro-batch, two thirds of it backward.
    """
    dense, experts = rank_weights(model, layout)
    per_node = cluster.gpus_per_node
    if layout.zero == 3 and layout.shard_size is not None:
        replicas = layout.dp * layout.cp // layout.shard_ranks
        group = span(replicas, layout.tp * layout.shard_ranks, per_node)
        comm = all_reduce(software.grad_bytes * dense / layout.shard_ranks, group, cluster)
        return exposed_seconds(comm, micro_s * 2 / 3, software.dp_overlap)
    group = span(layout.dp * layout.cp, layout.tp, per_node)
    copies = span(_expert_copies(layout), layout.ep, per_node)
    collective = all_reduce if layout.zero == 0 else all_gather
    backward = collective(software.grad_bytes * dense, group, cluster)
    forward = 0.0 if layout.zero == 0 else all_gather(2.0 * dense, group, cluster)
    if experts:
        backward += collective(software.grad_bytes * experts, copies, cluster)
        forward += 0.0 if layout.zero == 0 else all_gather(2.0 * experts, copies, cluster)
    exposed = exposed_seconds(backward, micro_s * 2 / 3, software.dp_overlap)
    return exposed + exposed_seconds(forward, micro_s / 3, software.dp_overlap)


def optimizer_seconds(model: ModelShape, layout: LayoutShape, cluster: Cluster) -> float:
    """The optimiser's pass over a rank's share of masters and moments."""
    dense, experts = rank_weights(model, layout)
    if layout.zero:
        dense /= layout.shard_ranks
        experts /= _expert_copies(layout)
    return memory_seconds(OPTIMIZER_BYTES * (dense + experts), cluster)


def _expert_copies(layout: LayoutShape) -> int:
    # Experts are divided over ep of a stage's tp x cp x dp ranks; the rest hold copies.
    return max(1, layout.tp * layout.cp * layout.dp // layout.ep)
