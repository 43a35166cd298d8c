"""A plan in the numbers a person asks for: hours, jobs, GPU-hours, share of the peak, what each link carries, memory of each stage."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from dist_llm.planning.cluster import Cluster
from dist_llm.planning.collectives import span
from dist_llm.planning.count_shapes import flops_of_token
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.rank_memory import memory_of
from dist_llm.planning.search import Plan
from dist_llm.planning.shapes import ModelShape
from dist_llm.topology.layout import Layout

__all__ = ["Costs", "costs_of", "describe", "layout_name", "num_steps"]


@dataclass(frozen=True)
class Costs:
    """Of a whole run. hours_low, hours_high: where nine of ten published runs of the hardware's generation would lie."""

    steps: int
    hours: float
    hours_low: float
    hours_high: float
    jobs: int
    gpu_hours: float
    tokens_per_s: float
    mfu: float


def num_steps(tokens: float, batch_size: int, seq_len: int) -> int:
    """Optimiser steps that read at least ``tokens`` tokens."""
    return max(1, math.ceil(tokens / (batch_size * seq_len)))


def costs_of(plan: Plan, model: ModelShape, cluster: Cluster, tokens: float, job_hours: float) -> Costs:
    """What ``tokens`` tokens cost at ``plan``.

    MFU is that of PaLM (arXiv:2204.02311, appendix B): 6 FLOPs a weight and the whole square of attention, over the peak of the
    plan's precision; recomputation does not count.
    """
    layout, step = plan.layout, plan.step
    batch_tokens = layout.global_batch * model.seq_len
    steps = num_steps(tokens, layout.global_batch, model.seq_len)
    hours = steps * step.total_s / 3600
    rate = batch_tokens / step.total_s
    peak = cluster.peak(layout.precision) * layout.ranks
    return Costs(
        steps=steps,
        hours=hours,
        hours_low=steps * step.low_s / 3600,
        hours_high=steps * step.high_s / 3600,
        jobs=math.ceil(hours / job_hours),
        gpu_hours=hours * layout.ranks,
        tokens_per_s=rate,
        mfu=rate * flops_of_token(model, causal=False).model / peak,
    )


def layout_name(layout: LayoutShape) -> str:
    """The canonical name that ``verify --layout`` and certificates use, with ``ep`` for experts behind it."""
    name = Layout(
        tp=layout.tp,
        pp=layout.pp,
        cp=layout.cp,
        dp=layout.dp,
        zero=layout.zero,
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
        recompute=layout.recompute,
        schedule="interleaved" if layout.virtual_pp > 1 else "1f1b",
        chunks=layout.virtual_pp,
        micro_batch=layout.micro_batch,
    ).name
    return f"{name}-ep{layout.ep}" if layout.ep > 1 else name


def communication(plan: Plan, cluster: Cluster) -> dict[str, dict[str, Any]]:
    """By axis: seconds of a step that nothing hides, and the slowest link the axis' traffic takes ("nvlink" or "network")."""
    layout, step, per_node = plan.layout, plan.step, cluster.gpus_per_node
    across = {
        "tp": span(layout.tp, 1, per_node).nodes > 1,
        "cp": span(layout.cp, layout.tp, per_node).nodes > 1,
        "ep": span(layout.ep, 1, per_node).nodes > 1,
        "pp": layout.pp > 1 and layout.ranks > per_node,
        "dp": span(layout.dp * layout.cp, layout.tp, per_node).nodes > 1,
    }
    seconds = {"tp": step.tp_comm_s, "cp": step.cp_comm_s, "ep": step.ep_comm_s, "pp": step.pp_comm_s, "dp": step.dp_comm_s}
    return {
        axis: {"seconds": seconds[axis], "link": "network" if across[axis] else "nvlink"}
        for axis, size in (("tp", layout.tp), ("cp", layout.cp), ("ep", layout.ep), ("pp", layout.pp), ("dp", layout.dp * layout.cp))
        if size > 1
    }


def describe(plan: Plan, model: ModelShape, cluster: Cluster, tokens: float, job_hours: float) -> dict[str, Any]:
    """Everything about a plan, as JSON has it: seconds, bytes, hours, shares from 0 to 1."""
    layout, step = plan.layout, plan.step
    costs = costs_of(plan, model, cluster, tokens, job_hours)
    parts = {name: getattr(step, name) for name in ("compute_s", "bubble_s", "optimizer_s", "straggler_s")}
    stages = [memory_of(model, layout, precision=layout.precision, stage=stage, saving=plan.saving) for stage in range(layout.pp)]
    return {
        "layout": layout_name(layout),
        "gpus": layout.ranks,
        "tp": layout.tp,
        "pp": layout.pp,
        "cp": layout.cp,
        "dp": layout.dp,
        "ep": layout.ep,
        "zero": layout.zero,
        "sequence_parallel": layout.sequence_parallel and layout.tp > 1,
        "schedule": "interleaved" if layout.virtual_pp > 1 else "1f1b",
        "chunks": layout.virtual_pp,
        "recompute": layout.recompute,
        "micro_batch_size": layout.micro_batch,
        "batch_size": layout.global_batch,
        "step_s": step.total_s,
        "step_interval_s": [step.low_s, step.high_s],
        **parts,
        "bubble": step.bubble_s / step.total_s,
        "communication": communication(plan, cluster),
        "memory_bytes": plan.memory.total,
        "fullest_stage": plan.memory.stage,
        "memory_of_stages": [asdict(stage) | {"total": stage.total} for stage in stages],
        **asdict(costs),
        "hours_interval": [costs.hours_low, costs.hours_high],
    }
