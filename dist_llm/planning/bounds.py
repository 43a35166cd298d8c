"""What a step takes at least, and needs at least, from a few figures that many layouts share.

Each bound leaves out something that only adds: traffic that is exposed, stages that are not equal, buffers. tests/planning holds every
bound against ``trainer_step`` and ``memory_of``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dist_llm.planning.calibration import calibration_of
from dist_llm.planning.cluster import Cluster
from dist_llm.planning.count_shapes import ShapeCount
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.overlap import exposed_seconds
from dist_llm.planning.rank_traffic import optimizer_seconds, reduction_seconds, zero3_seconds
from dist_llm.planning.roofline import element_bytes
from dist_llm.planning.shapes import ModelShape
from dist_llm.planning.software import MODERN
from dist_llm.planning.space import RECOMPUTE, Recompute, divisors
from dist_llm.planning.step_time import JITTER, step_time
from dist_llm.planning.trainer_step import gradient_sums

__all__ = ["STATE_BYTES", "state_bound", "step_bounds"]

STATE_BYTES = 12  # AdamW in fp32: a master and two moments a parameter


def state_bound(model: ModelShape, count: ShapeCount, layout: LayoutShape, precision: str) -> float:
    """Bytes of the fullest stage at least: its share of masters and moments and, in bf16, the weights that layers read; experts left out."""
    params = count.total - model.moe_layers * model.num_experts * model.expert_weights
    share = params / (layout.tp * layout.pp)
    if layout.zero == 0:
        return STATE_BYTES * share
    weights = 2 if precision != "fp32" and layout.zero < 3 else 0
    return (STATE_BYTES / (layout.dp * layout.cp) + weights) * share


class _Bounds:
    def __init__(self, model: ModelShape, cluster: Cluster, precision: str, limit_bytes: float) -> None:
        self.model, self.cluster, self.precision, self.limit_bytes = model, cluster, precision, limit_bytes

    def most_rows(self, layout: LayoutShape) -> float:
        """Rows of a micro-batch beyond which the inputs of a stage's blocks alone, kept even where all else is recomputed, do not fit."""
        row = element_bytes(self.precision) * self.model.seq_len / layout.cp * self.model.d_model / layout.tp
        return self.limit_bytes / (row * max(1, self.model.num_layers // layout.pp))

    def exchange(self, layout: LayoutShape) -> tuple[float, float]:
        """(seconds once a step, seconds a micro-batch) of optimiser and data-parallel traffic behind endless computation, which hides most of it."""
        scale = calibration_of(self.cluster.generation).scale
        once, each = optimizer_seconds(self.model, layout, self.cluster), 0.0
        if layout.zero == 3:
            each = exposed_seconds(zero3_seconds(self.model, layout, MODERN, self.cluster), math.inf, MODERN.dp_overlap)
        else:
            once += reduction_seconds(self.model, layout, MODERN, self.cluster, math.inf)
        if layout.zero in (1, 2):
            # trainer_step replaces the reduce-scatter by all-reduces where they take longer.
            sums = gradient_sums(self.model, layout, self.cluster)
            scattered, reduced = (exposed_seconds(seconds, math.inf, MODERN.dp_overlap) for seconds in sums)
            if layout.zero == 1:
                once += max(0.0, reduced - scattered)
            else:
                once, each = once - scattered, reduced
        return scale * once, scale * each

    def work(self, layout: LayoutShape, micro_batch: int, recompute: Recompute) -> float:
        """Seconds of one micro-batch through all layers and both ends on one rank's share, without anything done once a step."""
        alone = replace(
            layout, pp=1, dp=1, ep=1, zero=0, virtual_pp=1, micro_batch=micro_batch, global_batch=micro_batch, recompute=recompute
        )
        step = step_time(self.model, alone, self.cluster, software=MODERN)
        return step.compute_s + step.tp_comm_s + step.cp_comm_s + step.ep_comm_s


def step_bounds(
    model: ModelShape,
    divisions: Sequence[LayoutShape],
    cluster: Cluster,
    *,
    gpus: int,
    batch_size: int,
    precision: str,
    limit_bytes: float,
) -> Iterator[tuple[float, int, int, int]]:
    """(seconds of the step at least, number of the division, rows of a micro-batch, number in ``RECOMPUTE``) of every candidate.

    Candidates are the micro-batches that divide a rank's rows, without those whose blocks' inputs alone exceed ``limit_bytes``. Tuples,
    since there are hundreds of thousands.
    """
    bounds = _Bounds(model, cluster, precision, limit_bytes)
    stragglers = 1 + (JITTER * math.sqrt(2 * math.log(gpus)) if gpus > 1 else 0.0)
    work: dict[tuple[int, ...], list[float]] = {}
    once = each = 0.0
    for number, layout in enumerate(divisions):
        rows, pp, chunks = batch_size // layout.dp, layout.pp, layout.virtual_pp
        if chunks == 1:  # the other numbers of chunks follow, and exchange the same
            once, each = bounds.exchange(layout)
        most = bounds.most_rows(layout)
        for micro_batch in divisors(rows):
            num_micro = rows // micro_batch
            if micro_batch > most:
                break
            if chunks > 1 and num_micro % pp:
                continue
            key = (layout.tp, layout.cp, micro_batch)
            wholes = work.get(key)
            if wholes is None:
                wholes = work[key] = [bounds.work(layout, micro_batch, recompute) for recompute in RECOMPUTE]
            # The slowest of several stages does a pp-th of the work or more in every micro-batch; before and after it the others
            # do the rest once, a chunk at a time.
            share = 1 / chunks
            times = stragglers * (num_micro if pp == 1 else (num_micro - share) / pp + share)
            exchange = stragglers * (once + num_micro * each)
            for again, whole in enumerate(wholes):
                yield whole * times + exchange, number, micro_batch, again
