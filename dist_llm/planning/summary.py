"""The parts of a plan's answer that are not about one layout: the model with its law, what was rejected, what trades against what."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dist_llm.planning.answer import layout_name
from dist_llm.planning.cluster import Cluster
from dist_llm.planning.count_shapes import checkpoint_bytes_of, export_bytes, flops_of_token, token_bytes
from dist_llm.planning.pareto import front, time_against_memory
from dist_llm.planning.question import Question
from dist_llm.planning.search import Plan, Search
from dist_llm.planning.space import Refusal

__all__ = ["pareto_rows", "refusal_rows", "summary"]


def summary(question: Question) -> dict[str, Any]:
    """Model, tokens, FLOPs and what the law says about them, as JSON has it."""
    model, count = question.model, question.count
    rows: dict[str, Any] = {
        "model": {
            "params_total": count.total,
            "params_active": count.active,
            "params_embedding": count.embedding,
            "flops_per_token": flops_of_token(model).model,
            "checkpoint_bytes": checkpoint_bytes_of(count.total),
            "export_bytes": export_bytes(count.total),
            **asdict(model),
        },
        "tokens": round(question.tokens),
        "flops": question.flops,
        "batch_size": question.batch_size,
        "batch_tokens": question.batch_size * model.seq_len,
        "precision": question.precision,
        "token_bytes": token_bytes(int(question.tokens), model.vocab_size),
        "law": {**asdict(question.law), "loss": question.loss, "tokens_per_parameter": question.tokens / count.active},
    }
    optimum = question.law.optimal(question.flops)
    rows["law"] |= {"optimal_params": optimum.params, "optimal_tokens": optimum.tokens, "optimal_loss": optimum.loss}
    if question.advice is not None:
        rows["law"] |= {"published_params": list(question.advice.published), "params_within_0.01_nat": list(question.advice.tolerated)}
    return rows


def refusal_rows(search: Search) -> list[dict[str, Any]]:
    """Why layouts were left out, a group a reason: memory first, then the trainer's rules."""
    rows: list[dict[str, Any]] = []
    memory, _ = search.memory_refusal()
    if memory is not None:
        rows.append({**_row(memory), "excess_bytes": memory.excess_bytes, "of": search.divisions})
    rows += [_row(refusal) for _, refusal in sorted(search.space.refusals.items())]
    return rows


def _row(refusal: Refusal) -> dict[str, Any]:
    example = layout_name(refusal.example)
    return {"kind": refusal.kind, "key": refusal.key, "count": refusal.count, "reason": refusal.message, "example": example}


def pareto_rows(search: Search, question: Question, cluster: Cluster, limit_bytes: float | None) -> list[dict[str, Any]]:
    """Plans on all, half and a quarter of the devices that no other plan beats in time, memory and number of devices together."""
    plans: list[Plan] = time_against_memory(search, step=0.25)
    for part in (2, 4):
        if search.gpus % part == 0:
            fewer = Search(
                question.model, search.gpus // part, cluster, question.batch_size, question.precision, limit_bytes, question.kernels
            )
            plans += time_against_memory(fewer, step=0.25)
    kept = front(plans, lambda p: (p.step.total_s, float(p.memory.total), float(p.layout.ranks)))
    return [
        {"gpus": p.layout.ranks, "step_s": p.step.total_s, "memory_bytes": p.memory.total, "layout": layout_name(p.layout)} for p in kept
    ]
