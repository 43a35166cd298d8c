"""Every legal layout that fits, one after the other: what ``search`` must answer, without a single shortcut.

It shares with the search the questions (``Legality``, ``memory_of``, ``trainer_step``) and none of its ways to leave something out. For
tests, on up to a few hundred devices.
"""

from __future__ import annotations

import itertools

from dist_llm.planning.cluster import Cluster
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.legality import Legality
from dist_llm.planning.rank_memory import memory_of
from dist_llm.planning.saving import AUTO, saving_of
from dist_llm.planning.search import Plan
from dist_llm.planning.shapes import ModelShape
from dist_llm.planning.space import RECOMPUTE
from dist_llm.planning.trainer_step import trainer_step

__all__ = ["all_plans"]


def all_plans(
    model: ModelShape, gpus: int, cluster: Cluster, batch_size: int, *, precision: str = "bf16", limit_bytes: float | None = None
) -> list[Plan]:
    """All plans, best first, by trying every number for every axis."""
    legality = Legality(model, batch_size, precision)
    limit = cluster.memory_bytes if limit_bytes is None else limit_bytes
    sizes = range(1, gpus + 1)
    saving = saving_of(AUTO, model, cluster.kind, precision)
    plans = []
    for tp, pp, cp in itertools.product(sizes, sizes, sizes):
        if gpus % (tp * pp * cp):
            continue
        dp = gpus // (tp * pp * cp)
        chunks = [v for v in range(1, model.num_layers + 1) if v == 1 or (pp > 1 and model.num_layers % (pp * v) == 0)]
        for zero, v, ep, micro_batch, recompute in itertools.product(
            range(4), chunks, range(1, max(1, model.num_experts) + 1), range(1, batch_size + 1), RECOMPUTE[::-1]
        ):
            if batch_size % (dp * micro_batch):
                continue
            layout = LayoutShape(
                tp=tp, pp=pp, cp=cp, dp=dp, ep=ep, zero=zero, micro_batch=micro_batch, global_batch=batch_size, virtual_pp=v,
                recompute=recompute, precision=precision, sequence_parallel=tp > 1 and model.seq_len % (tp * cp) == 0,
            )  # fmt: skip
            if legality.refusal(layout) is not None:
                continue
            memory = memory_of(model, layout, precision=precision, saving=saving)
            if memory.total <= limit:
                plans.append(Plan(layout, trainer_step(model, layout, cluster), memory, saving))
    return sorted(plans, key=lambda plan: plan.key)
