"""Everything about a run that can be known before it starts; writes nothing, makes no process group."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from dist_llm.config.load import ConfigErrors
from dist_llm.config.rules import problems_for_ranks
from dist_llm.config.schema import RunConfig
from dist_llm.engine.attempt import open_rows
from dist_llm.engine.batches import rows_of_rank
from dist_llm.engine.build import uses_deepspeed
from dist_llm.engine.ranks import read_launch
from dist_llm.engine.run_dir import corpus_hash, decide_start
from dist_llm.optim.schedule import learning_rate
from dist_llm.planning.count import count_params, flops_per_token
from dist_llm.planning.memory import checkpoint_bytes, rank_memory
from dist_llm.planning.stages import stage_layers
from dist_llm.utils.errors import ExitCode
from dist_llm.utils.format import byte_size

__all__ = ["dry_run", "resolve"]


def dry_run(config: RunConfig, *, ranks: int | None, as_json: bool) -> int:
    """Print what ``train`` would do.

    Raises:
        UserError: what ``train`` would refuse, with the same message and code.
    """
    answer = resolve(config, ranks=ranks)
    print(json.dumps(answer) if as_json else _as_text(answer))
    return ExitCode.DONE


def resolve(config: RunConfig, *, ranks: int | None) -> dict[str, Any]:
    """Layout, parameters, memory, first batch, steps and disk of ``config`` on ``ranks`` ranks (default: the launcher's)."""
    launch = read_launch()
    world = ranks if ranks is not None else launch.world_size
    problems = problems_for_ranks(config, world)
    if problems:
        raise ConfigErrors(problems)
    deepspeed = uses_deepspeed(config, world)
    layout = _layout(config, world, deepspeed=deepspeed)
    rows, eval_rows = open_rows(config)
    start = decide_start(Path(config.directory) / "checkpoints", config, corpus_hash(rows.index))
    params = count_params(config.model)
    memory = rank_memory(config, world, plain=not deepspeed)
    train = config.train
    tokens = train.steps * train.batch_size * config.data.seq_len
    first = rows_of_rank(start.next_sample, batch_size=train.batch_size, micro=train.micro_batch_size, rank=0, ranks=layout["dp"])
    one_checkpoint = checkpoint_bytes(config)
    kept = config.checkpoint.keep if config.checkpoint.every else 1
    if config.checkpoint.keep == 0 and config.checkpoint.every:
        kept = -(-train.steps // config.checkpoint.every)
    existing = Path(config.directory)
    while not existing.exists():
        existing = existing.parent
    return {
        "run_dir": config.directory,
        "layout": layout,
        "parameters": {"total": params.total, "embedding": params.embedding, "non_embedding": params.non_embedding},
        "flops": flops_per_token(config.model, config.data.seq_len) * tokens,
        "memory_per_rank": {
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations_estimate": memory.activations,
            "logits_estimate": memory.logits,
            "total": memory.total,
            # On a GPU `auto` still takes plain PyTorch for most ops, which keeps more for the backward.
            "total_on_cpu": rank_memory(config, world, plain=not deepspeed, device="cpu").total,
        },
        "first_batch": {
            "rank_0_rows": [[r.start, r.stop - 1] for r in first],
            "micro_batches": len(first),
            "tokens": train.batch_size * config.data.seq_len,
            "begins": rows.row(start.next_sample).tokens[:12].tolist(),
        },
        "steps": {
            "from": start.step,
            "to": train.steps,
            "tokens": tokens,
            "tokens_per_parameter": tokens / params.total,
            "epochs": train.steps * train.batch_size / rows.num_rows,
            "first_lr": learning_rate(start.step + 1, optim=config.optim, steps=train.steps) if start.step < train.steps else None,
            "held_out_rows": eval_rows.num_eval_rows if eval_rows is not None else 0,
        },
        "disk": {
            "checkpoint": one_checkpoint,
            # One more than is kept: the new one is whole before an old one goes.
            "needed": one_checkpoint * (kept + 1),
            "free": shutil.disk_usage(existing).free,
        },
        "notes": start.notes,
    }


def _layout(config: RunConfig, world: int, *, deepspeed: bool) -> dict[str, Any]:
    """The rank grid, what divides what, and the layers of each pipeline rank."""
    p = config.parallel
    stages = stage_layers(config.model, config.data.seq_len, p.pp * p.chunks)
    return {
        "ranks": world,
        "engine": "deepspeed" if deepspeed else "plain",
        "tp": p.tp,
        "cp": p.cp,
        "dp": world // (p.tp * p.cp * p.pp),
        "pp": p.pp,
        "zero": p.zero if deepspeed else None,
        "sequence_parallel": p.sequence_parallel,
        "cp_kind": p.cp_kind if p.cp > 1 else None,
        "schedule": p.schedule if p.pp > 1 else None,
        # First and last layer of each stage that a pipeline rank holds; several with an interleaved schedule.
        "stages": [[[s.start, s.stop - 1] for s in stages[rank :: p.pp]] for rank in range(p.pp)],
        "offload_optimizer": p.offload_optimizer,
        "offload_parameters": p.offload_parameters,
        "recompute": p.recompute,
        "precision": config.precision,
    }


def _layout_lines(layout: dict[str, Any]) -> list[str]:
    """How a person reads ``_layout``: axes of one rank are left out."""
    axes = [f"{axis} {layout[axis]}" for axis in ("tp", "cp", "dp", "pp") if layout[axis] > 1]
    engine = f"deepspeed, ZeRO-{layout['zero']}" if layout["zero"] is not None else "plain"
    words = [f"{layout['ranks']} rank(s)" + (f" = {' x '.join(axes)}" if axes else ""), engine]
    words += ["sequence parallel"] if layout["sequence_parallel"] else []
    words += [f"context by {layout['cp_kind']}"] if layout["cp_kind"] else []
    for what in ("optimizer", "parameters"):
        words += [f"{what} offloaded to {where}"] if (where := layout[f"offload_{what}"]) != "none" else []
    lines = [f"layout      {', '.join(words)}, {layout['precision']}, recompute {layout['recompute']}"]
    if layout["schedule"]:
        held = (", ".join(_span(*stage) for stage in stages) for stages in layout["stages"])
        lines.append(
            f"pipeline    {layout['schedule']}; layers " + "; ".join(f"{layers} on rank {rank}" for rank, layers in enumerate(held))
        )
    return lines


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _as_text(answer: dict[str, Any]) -> str:
    layout, params, memory, steps, disk = (answer[k] for k in ("layout", "parameters", "memory_per_rank", "steps", "disk"))
    lines = [
        f"run         {answer['run_dir']}",
        *_layout_lines(layout),
        f"parameters  {params['total']:,} ({params['embedding']:,} in embeddings, {params['non_embedding']:,} in blocks and norms)",
        f"memory      {byte_size(memory['total'])} on the fullest rank: parameters {byte_size(memory['parameters'])}, gradients {byte_size(memory['gradients'])}, "
        f"optimiser {byte_size(memory['optimizer'])}, activations about {byte_size(memory['activations_estimate'])}, "
        f"logits about {byte_size(memory['logits_estimate'])}, with what a GPU would compute; on a CPU {byte_size(memory['total_on_cpu'])}",
        f"first batch {answer['first_batch']['tokens']:,} tokens in {answer['first_batch']['micro_batches']} micro-batch(es) a rank; "
        f"rank 0 reads samples {answer['first_batch']['rank_0_rows'][:4]}",
        f"steps       {steps['from']} to {steps['to']}, {steps['tokens']:,} tokens ({steps['tokens_per_parameter']:.1f} a parameter, "
        f"{steps['epochs']:.2f} epochs), {answer['flops']:.3g} FLOPs",
        f"held out    {steps['held_out_rows']:,} rows",
        f"disk        {byte_size(disk['checkpoint'])} a checkpoint, {byte_size(disk['needed'])} needed, {byte_size(disk['free'])} free",
    ]
    if disk["needed"] > disk["free"]:
        print(f"warning: the checkpoints need {byte_size(disk['needed'])}, {byte_size(disk['free'])} are free", file=sys.stderr)
    lines += [f"note        {note}" for note in answer["notes"]]
    return "\n".join([*lines, "nothing was written"])
