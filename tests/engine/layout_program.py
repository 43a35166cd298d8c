"""What the ranks of test_layouts.py and test_offload.py do: top-level functions, since ranks import them by name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist_llm.checkpoint.load import open_checkpoint
from dist_llm.checkpoint.save import save_checkpoint
from dist_llm.comm.build import build_context
from dist_llm.comm.context import ParallelContext
from dist_llm.config.load import load_config
from dist_llm.config.schema import RunConfig
from dist_llm.engine.base import Engine
from dist_llm.engine.batches import StepBatches
from dist_llm.engine.build import build_engine, choose_ops
from dist_llm.engine.step import StepResult, train_step
from dist_llm.optim.schedule import learning_rate
from dist_llm.parallel.divide import grid_of
from dist_llm.verify.figures import take_steps
from dist_llm.verify.rows import MadeUpRows

ROOT = Path(__file__).resolve().parent.parent.parent
SAVED_AT, END = 5, 10
ALONE = ParallelContext(device=torch.device("cpu"))
# Loss and gradient norm of each step taken, digit for digit.
Curve = list[tuple[float, float]]


def config_at(tiny: str, words: Sequence[str]) -> RunConfig:
    """A tiny config at the layout that ``words`` describe; eps 1e-5, so that rounding noise is not made a step of full size."""
    common = [f"train.steps={END}", "train.batch_size=8", "train.micro_batch_size=2", "optim.eps=1e-5"]
    return load_config(ROOT / f"configs/tiny/{tiny}.yaml", [*common, *words]).config


def context_for(config: RunConfig, ctx: ParallelContext) -> ParallelContext:
    """The groups of ``config`` over the ranks of this launch."""
    if ctx.world.size == 1:
        return ctx
    grid, rank = grid_of(config.parallel, ctx.world.size), ctx.world.rank
    return build_context(grid, rank, ctx.device, kv_heads=config.model.kv_heads, local_rank=rank, local_size=ctx.world.size)


def train(engine: Engine, config: RunConfig, ctx: ParallelContext, first: int, last: int) -> Curve:
    """Steps ``first`` to ``last``, counted from 1."""
    batches = StepBatches(MadeUpRows(config), config, ctx)
    curve = []
    for step in range(first, last + 1):
        lr = learning_rate(step, optim=config.optim, steps=config.train.steps)
        result = train_step(engine, ctx, batches, next_sample=(step - 1) * config.train.batch_size, lr=lr, stop_code=0)
        assert isinstance(result, StepResult)
        curve.append((result.loss, result.grad_norm))
    return curve


def save(engine: Engine, config: RunConfig, ctx: ParallelContext, root: Path) -> Path:
    """A checkpoint after SAVED_AT steps, as the loop writes it."""
    described = config.model_dump(mode="json")
    return save_checkpoint(
        root, engine.state(), step=SAVED_AT, next_sample=SAVED_AT * config.train.batch_size, tokens=0, config=described, corpus="none",
        versions={}, writes=ctx.is_main,
    )  # fmt: skip


def whole_run(config: RunConfig, ctx: ParallelContext, root: Path) -> Curve:
    """All steps without an interruption, with a checkpoint on the way."""
    engine = build_engine(config, ctx, choose_ops(config, ctx), None)
    curve = train(engine, config, ctx, 1, SAVED_AT)
    save(engine, config, ctx, root)
    curve += train(engine, config, ctx, SAVED_AT + 1, END)
    engine.close()
    return curve


def continued(config: RunConfig, ctx: ParallelContext, saved: Path) -> Curve:
    """The steps after a checkpoint, by a new engine."""
    checkpoint = open_checkpoint(saved)
    engine = build_engine(config, ctx, choose_ops(config, ctx), checkpoint)
    curve = train(engine, config, ctx, checkpoint.manifest.step + 1, END)
    engine.close()
    return curve


def checkpoints_at_layouts(
    ctx: ParallelContext, root: str, own: dict[str, tuple[str, list[str]]], crossings: list[tuple[str, str]]
) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Runs with a checkpoint in the middle, and continuations.

    Args:
        ctx: of the launch.
        root: holds a directory for each run; "plain" is there already.
        own: name -> tiny config and words of a layout, each run whole and continued from its own checkpoint.
        crossings: (from, to) names: continued at ``to`` from the checkpoint of ``from``.

    Returns:
        curves of the whole runs by name, of the continuations by "from > to".
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    whole, rest = {}, {}
    for name, (tiny, words) in own.items():
        config = config_at(tiny, words)
        whole[name] = whole_run(config, context_for(config, ctx), Path(root) / name)
    for origin, target in [*((name, name) for name in own), *crossings]:
        config = config_at(*own[target])
        rest[f"{origin} > {target}"] = continued(config, context_for(config, ctx), Path(root) / origin / f"step-{SAVED_AT:08d}")
    return whole, rest


def offloads(ctx: ParallelContext, root: str, configs: dict[str, tuple[str, list[str]]], resumed: list[str]) -> dict[str, Any]:
    """Figures of a few steps of each config (tensors whole, on the main rank); of those in ``resumed`` three curves: a whole run, its second half from its
    checkpoint, and that without offload."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    figures, curves = {}, {}
    for name, (tiny, words) in configs.items():
        config = config_at(tiny, words)
        mine = context_for(config, ctx)
        taken = take_steps(config, mine, MadeUpRows(config))
        figures[name] = taken.to_tensors() if ctx.is_main else {}
        if name in resumed:
            whole = whole_run(config, mine, Path(root) / name)
            saved = Path(root) / name / f"step-{SAVED_AT:08d}"
            without = config_at(tiny, [word for word in words if "offload" not in word])
            curves[name] = (whole, continued(config, mine, saved), continued(without, mine, saved))
    return {"figures": figures, "curves": curves}
