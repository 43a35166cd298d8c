"""Seconds of one optimiser step: compute, collectives, pipeline, optimiser, and what of each is hidden behind another.

step = (micro-batches through the pipeline + exposed gradient and parameter traffic + optimiser) x stragglers x calibration

The pipeline is 1F1B, plain or interleaved (Narayanan et al., arXiv:2104.04473, section 2.2): the slowest stage works on every
micro-batch, and before and after it the others fill and drain, v times faster with v chunks a stage. For equal stages that is
their closed form, a bubble of (p-1)/(v m) of the work.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from dist_llm.planning.calibration import calibration_of
from dist_llm.planning.cluster import Cluster
from dist_llm.planning.collectives import all_gather, all_reduce, all_to_all, point_to_point, span
from dist_llm.planning.layer_time import Cost, end_seconds, layer_seconds
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.overlap import exposed_seconds
from dist_llm.planning.rank_traffic import optimizer_seconds, rank_weights, reduction_seconds, zero3_seconds
from dist_llm.planning.roofline import element_bytes, memory_seconds
from dist_llm.planning.shapes import ModelShape
from dist_llm.planning.software import MODERN, Recompute, Software
from dist_llm.planning.stage_split import bubble_seconds, stage_layers

__all__ = ["LayoutShape", "StepTime", "step_time"]

JITTER = 0.01  # spread of a device's step time; all wait for the slowest of n: about sqrt(2 ln n) spreads above the mean


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and of the parts that add up to it; communication counts only where nothing hides it.

    ``low_s`` and ``high_s`` hold nine of ten published runs of the hardware's generation.
    """

    total_s: float
    compute_s: float
    tp_comm_s: float
    cp_comm_s: float
    ep_comm_s: float
    pp_comm_s: float
    dp_comm_s: float
    bubble_s: float
    optimizer_s: float
    straggler_s: float
    low_s: float
    high_s: float


class _Layer(NamedTuple):
    compute: float
    tp: float
    cp: float
    ep: float


def step_time(
    model: ModelShape,
    layout: LayoutShape,
    cluster: Cluster,
    *,
    software: Software = MODERN,
    scale: float | None = None,
) -> StepTime:
    """Time of one step of ``model`` at ``layout`` on ``cluster``.

    Args:
        model: shape, with the rows' length.
        layout: axes and batch; ``layout.global_batch`` rows a step.
        cluster: rates, from ``load_cluster``.
        software: what the training system overlaps and fuses.
        scale: factor on the whole; default the calibration of the hardware's generation.
    """
    calibration = calibration_of(cluster.generation)
    factor = calibration.scale if scale is None else scale
    num_micro, pp = layout.num_micro, layout.pp
    layer = _mean_layer(model, layout, software, cluster)
    one = sum(layer)
    embedding, head = _ends(model, layout, software, cluster)
    most, last = stage_layers(model.num_layers, pp)
    extra = 0.0
    if num_micro > 1 and software.accumulate_bytes:
        extra = memory_seconds(software.accumulate_bytes * sum(rank_weights(model, layout)), cluster)

    if pp == 1:
        layers, slowest = most, most * one + embedding + head + extra
        bubble = pp_comm = 0.0
    else:
        middle, end = most * one + extra, last * one + head + extra
        first = middle + embedding
        layers, slowest = (last, end) if end > first else (most, first)
        bubble = bubble_seconds(first, middle, end, pp, layout.virtual_pp)
        hop = _hop(model, layout, cluster)
        pp_comm = 2 * hop * (pp - 1 + layout.virtual_pp * num_micro * (1 - software.pp_overlap))
    compute = slowest - layers * (layer.tp + layer.cp + layer.ep)

    # ZeRO-3 moves parameters and gradients in every micro-batch, or keeps them over the step where a pipeline needs them often.
    if layout.zero == 3 and (pp == 1 or software.gathers_every_micro):
        dp_comm = num_micro * exposed_seconds(zero3_seconds(model, layout, software, cluster), slowest, software.dp_overlap)
        if layout.shard_size is not None:
            dp_comm += reduction_seconds(model, layout, software, cluster, slowest)
    else:
        dp_comm = reduction_seconds(model, layout, software, cluster, slowest)
    optimizer = optimizer_seconds(model, layout, cluster)
    plain = num_micro * slowest + bubble + pp_comm + dp_comm + optimizer
    straggler = plain * JITTER * math.sqrt(2 * math.log(layout.ranks)) if layout.ranks > 1 else 0.0
    total = (plain + straggler) * factor
    return StepTime(
        total_s=total,
        compute_s=num_micro * compute * factor,
        tp_comm_s=num_micro * layers * layer.tp * factor,
        cp_comm_s=num_micro * layers * layer.cp * factor,
        ep_comm_s=num_micro * layers * layer.ep * factor,
        pp_comm_s=pp_comm * factor,
        dp_comm_s=dp_comm * factor,
        bubble_s=bubble * factor,
        optimizer_s=optimizer * factor,
        straggler_s=straggler * factor,
        low_s=total * math.exp(-calibration.spread),
        high_s=total * math.exp(calibration.spread),
    )


def _mean_layer(model: ModelShape, layout: LayoutShape, software: Software, cluster: Cluster) -> _Layer:
    # Layers with experts are spread over the stages as the others are.
    axes = (layout.micro_batch, layout.tp, layout.cp, layout.ep, layout.sequence_parallel, layout.precision, layout.recompute)
    share = model.moe_layers / model.num_layers
    if share == 0.0:
        return _layer(model, axes, False, software, cluster)
    expert = _layer(model, axes, True, software, cluster)
    if share == 1.0:
        return expert
    dense = _layer(model, axes, False, software, cluster)
    return _Layer(*((1 - share) * a + share * b for a, b in zip(dense, expert, strict=True)))


@functools.lru_cache(maxsize=65536)
def _layer(model: ModelShape, axes: tuple[int, int, int, int, bool, str, str], moe: bool, software: Software, cluster: Cluster) -> _Layer:
    # Forward and backward of one micro-batch, recomputation included.
    rows, tp, cp, ep, sequence_parallel, precision, recompute = axes
    forward, backward = layer_seconds(model, rows, tp, cp, sequence_parallel and tp > 1, precision, moe, software, cluster)
    again = Recompute.full() if recompute == "full" else software.selective if recompute == "selective" else Recompute()
    compute = forward.total + backward.total + _again(forward, again) + software.layer_overhead_s
    tokens = rows * model.seq_len / cp
    stream = element_bytes(precision) * tokens * model.d_model

    tp_s = 0.0
    if tp > 1:
        # Two sums forward and two backward (Shoeybi et al., arXiv:1909.08053, figure 4); divided over the sequence they are a
        # reduce-scatter and an all-gather each, with the same traffic. What is computed again is summed again.
        tp_s = (4.0 + 2.0 * again.collectives) * all_reduce(stream, span(tp, 1, cluster.gpus_per_node), cluster)
        tp_s *= 1.0 - software.tp_overlap
    cp_s = 0.0
    if cp > 1:
        # Keys and values of all ranks pass by, behind the attention to the part at hand; backward their gradients travel as well.
        keys = 2 * element_bytes(precision) * tokens * cp * max(1.0, model.num_kv_heads / tp) * model.head_dim
        ring = all_gather(keys, span(cp, tp, cluster.gpus_per_node), cluster)
        cp_s = exposed_seconds(ring, forward.attention, software.cp_overlap)
        cp_s += exposed_seconds(2 * ring, backward.attention, software.cp_overlap)
    ep_s = 0.0
    if moe and ep > 1:
        group = span(ep, 1, cluster.gpus_per_node)
        # Of k experts drawn over n nodes, n (1 - (1 - 1/n)^k) nodes are met on average: a token crosses to each once.
        met = group.nodes * (1 - (1 - 1 / group.nodes) ** model.experts_per_token)
        once = met / model.experts_per_token if software.once_a_node else 1.0
        exchange = software.imbalance * all_to_all(stream / tp * model.experts_per_token, group, cluster, once_a_node=once)
        # Tokens go out and come back, forward and backward.
        ep_s = exposed_seconds((4.0 + 2.0 * again.collectives) * exchange, compute, software.ep_overlap)
    return _Layer(compute, tp_s, cp_s, ep_s)


def _again(cost: Cost, share: Recompute) -> float:
    return cost.gemm * share.gemm + cost.attention * share.attention + cost.elementwise * share.elementwise


def _ends(model: ModelShape, layout: LayoutShape, software: Software, cluster: Cluster) -> tuple[float, float]:
    tokens = layout.micro_batch * model.seq_len / layout.cp
    embedding, forward, backward = end_seconds(model, tokens, layout.tp, layout.precision, software, cluster)
    sums = all_reduce(element_bytes(layout.precision) * tokens * model.d_model, span(layout.tp, 1, cluster.gpus_per_node), cluster)
    return embedding + sums, forward + backward + sums


def _hop(model: ModelShape, layout: LayoutShape, cluster: Cluster) -> float:
    # Each tensor-parallel rank sends its part of the stream to its counterpart (arXiv:2104.04473, section 4.1).
    num_bytes = element_bytes(layout.precision) * layout.micro_batch * model.seq_len / layout.cp * model.d_model / layout.tp
    return point_to_point(num_bytes, across_nodes=layout.ranks > cluster.gpus_per_node, cluster=cluster)
