"""Seconds of a step as this trainer does it: the time model, with gradients summed the way DeepSpeed's ZeRO 1 and 2 sum them.

Published systems reduce-scatter gradients once a step, and so does ``step_time``. DeepSpeed 0.19.8 as the engine configures it
all-reduces them in fp32 (``zero_traffic.py`` counts the calls): ZeRO-1 once a step, ZeRO-2 in every micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import replace

from dist_llm.planning.calibration import calibration_of
from dist_llm.planning.cluster import Cluster
from dist_llm.planning.collectives import all_gather, all_reduce, span
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.overlap import exposed_seconds
from dist_llm.planning.rank_traffic import rank_weights
from dist_llm.planning.shapes import ModelShape
from dist_llm.planning.software import MODERN
from dist_llm.planning.step_time import JITTER, StepTime, step_time

__all__ = ["gradient_sums", "trainer_step"]

_BACKWARD = 2 / 3  # of a micro-batch's computation


def trainer_step(model: ModelShape, layout: LayoutShape, cluster: Cluster) -> StepTime:
    """Time of one step of ``model`` at ``layout`` on ``cluster``; never below ``step_time``, which ``bounds.py`` relies on."""
    step = step_time(model, layout, cluster, software=MODERN)
    if layout.zero not in (1, 2) or layout.dp * layout.cp * layout.tp == 1:
        return step
    scale = calibration_of(cluster.generation).scale
    micro_s = (step.compute_s + step.tp_comm_s + step.cp_comm_s + step.ep_comm_s) / (layout.num_micro * scale)
    scattered, reduced = gradient_sums(model, layout, cluster)
    once = exposed_seconds(scattered, micro_s * _BACKWARD, MODERN.dp_overlap)
    each = exposed_seconds(reduced, micro_s * _BACKWARD, MODERN.dp_overlap)
    rounds = layout.num_micro if layout.zero == 2 else 1
    more = scale * max(0.0, rounds * each - once)
    stragglers = more * JITTER * math.sqrt(2 * math.log(layout.ranks)) if layout.ranks > 1 else 0.0
    total = step.total_s + more + stragglers
    return replace(
        step,
        total_s=total,
        dp_comm_s=step.dp_comm_s + more,
        straggler_s=step.straggler_s + stragglers,
        low_s=step.low_s * total / step.total_s,
        high_s=step.high_s * total / step.total_s,
    )


def gradient_sums(model: ModelShape, layout: LayoutShape, cluster: Cluster) -> tuple[float, float]:
    """Seconds of a reduce-scatter, and of an all-reduce, of all of a rank's gradients, nothing hidden.

    Those outside experts are summed over dp x cp, those of experts over the ranks that hold copies.
    """
    dense, experts = rank_weights(model, layout)
    parts = [(dense, span(layout.dp * layout.cp, layout.tp, cluster.gpus_per_node))]
    if experts:
        copies = max(1, layout.tp * layout.cp * layout.dp // layout.ep)
        parts.append((experts, span(copies, layout.ep, cluster.gpus_per_node)))
    scattered = sum(all_gather(MODERN.grad_bytes * elements, group, cluster) for elements, group in parts)
    reduced = sum(all_reduce(MODERN.grad_bytes * elements, group, cluster) for elements, group in parts)
    return scattered, reduced
