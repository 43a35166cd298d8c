"""What runs on the ranks: the plain process, and several layouts of one world size, one after the other."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from safetensors.torch import load_file, save_file

from dist_llm.comm.build import build_context
from dist_llm.comm.collectives import gather_json
from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import RunConfig
from dist_llm.parallel.divide import grid_of
from dist_llm.planning.count import parameter_shapes
from dist_llm.verify.figures import Figures, compare, take_steps
from dist_llm.verify.outputs import part_names
from dist_llm.verify.rows import MadeUpRows

__all__ = ["layouts_program", "plain_program"]


def plain_program(ctx: ParallelContext, config: dict[str, Any], path: str) -> list[float]:
    """One plain process, no DeepSpeed; writes its figures to ``path`` and returns its losses."""
    run = RunConfig.model_validate(config)
    figures = take_steps(run, ParallelContext(device=ctx.device), MadeUpRows(run))
    save_file(figures.to_tensors(), path)
    return [float(loss) for loss in figures.losses]


def layouts_program(
    ctx: ParallelContext, configs: Sequence[dict[str, Any]], path: str, tolerance: float, done: str
) -> list[dict[str, Any]]:
    """Each of ``configs`` on this world, compared with the plain figures in ``path``; an answer a config, on every rank.

    An answer is a ``Difference`` as a dict, or ``{"error": traceback}`` when building or a step raised on every rank alike.
    The main rank writes each to the file ``done`` at once, a line an answer: should a later layout break the launch, the earlier
    ones are known.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch renames a collective that DeepSpeed calls by its old name
    answers: list[dict[str, Any]] = []
    for config in configs:
        run = RunConfig.model_validate(config)
        mine = build_context(
            grid_of(run.parallel, ctx.world.size), ctx.world.rank, ctx.device, kv_heads=run.model.kv_heads,
            local_rank=ctx.world.rank, local_size=ctx.world.size,
        )  # fmt: skip
        answer: dict[str, Any] = {}
        try:
            figures = take_steps(run, mine, MadeUpRows(run))
            if mine.is_main:
                plain = Figures.from_tensors(load_file(path))
                answer = asdict(compare(_in_order(plain, run), _in_order(figures, run), tolerance=tolerance))
        except Exception:  # any bug of a layout is an answer about that layout
            if ctx.world.size > 1:
                raise  # the other ranks may be waiting in a collective: the runner ends them and names this one
            answer = {"error": traceback.format_exc()}
        answers.append(gather_json(answer, ctx.world, ctx.device)[0])
        if ctx.is_main:
            with open(done, "a", encoding="utf-8") as f:
                print(json.dumps(answers[-1]), file=f)
    return answers


def _in_order(figures: Figures, run: RunConfig) -> Figures:
    """Names in the model's order, which files do not keep; what is named as the first that differs depends on it."""
    names = list(parameter_shapes(run.model))
    return replace(
        figures,
        gradients={name: figures.gradients[name] for name in names},
        weights={name: figures.weights[name] for name in names},
        outputs={name: figures.outputs[name] for name in part_names(run) if name in figures.outputs},
    )
