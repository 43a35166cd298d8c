"""From a config to a model in an engine, on a fresh start or from a checkpoint."""

from __future__ import annotations

import torch

from dist_llm.checkpoint.load import Checkpoint
from dist_llm.comm.collectives import gather_json
from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import RunConfig
from dist_llm.engine.base import Engine, LossModule, TrainState
from dist_llm.engine.plain import PlainEngine
from dist_llm.kernels.impl import Impl
from dist_llm.kernels.table import choices
from dist_llm.models.decoder import Decoder
from dist_llm.parallel.divide import Parts, build_parts
from dist_llm.utils.errors import ConfigError, LaunchError

__all__ = ["build_engine", "build_model", "choose_ops", "compute_dtype", "uses_deepspeed"]


def uses_deepspeed(config: RunConfig, world_size: int) -> bool:
    """Which engine a run gets: the plain one on a single rank, unless the config names DeepSpeed.

    Raises:
        ConfigError: the plain engine on several ranks.
    """
    if config.train.engine == "plain" and world_size > 1:
        raise ConfigError(
            f"train.engine: 'plain' runs on one rank, this launch has {world_size}; leave it on auto, or start a single process"
        )
    return config.train.engine == "deepspeed" or world_size > 1


def compute_dtype(config: RunConfig) -> torch.dtype:
    """dtype of activations."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def choose_ops(config: RunConfig, ctx: ParallelContext) -> dict[str, Impl]:
    """The implementation of each op; the same on every rank.

    Raises:
        LaunchError: ranks can run different ones, which would make them compute different numbers.
    """
    rings = ctx.cp.size > 1 and config.parallel.cp_kind == "ring"
    chosen = choices(
        ctx.device,
        compute_dtype(config),
        config.kernels.model_dump(),
        layout_functions=("attention_block", "attention_block_backward") if rings else (),
    )
    mine = {op: impl.name for op, impl in chosen.items()}
    for rank, theirs in enumerate(gather_json(mine, ctx.world, ctx.device)):
        if theirs != mine:
            raise LaunchError(
                f"rank {rank} would compute with {theirs}, rank {ctx.world.rank} with {mine}; "
                "build the extension on every node, or name the implementations under kernels: in the config"
            )
    return chosen


def build_model(config: RunConfig, chosen: dict[str, Impl]) -> Decoder:
    """The whole model with empty parameters, on CPU."""
    return build_parts(_undivided(config), _ALONE, chosen, compute_dtype=compute_dtype(config)).models[0]


def build_engine(config: RunConfig, ctx: ParallelContext, chosen: dict[str, Impl], checkpoint: Checkpoint | None) -> Engine:
    """The engine of this run with its state in place."""
    deepspeed = uses_deepspeed(config, ctx.world.size)
    parts = build_parts(config if deepspeed else _undivided(config), ctx, chosen, compute_dtype=compute_dtype(config))
    state = _initial_state(parts, config.seed) if checkpoint is None else _state_of(parts, checkpoint)
    modules = [LossModule(model.to(ctx.device), parts.cross_entropy) for model in parts.models]
    if deepspeed:
        from dist_llm.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(modules, config, state, ctx, adamw_step=chosen["adamw_step"].fn)
    return PlainEngine(modules[0], config.optim, state, adamw_step=chosen["adamw_step"].fn, sum_of_squares=chosen["sum_of_squares"].fn)


_ALONE = ParallelContext(device=torch.device("cpu"))


def _undivided(config: RunConfig) -> RunConfig:
    kept = config.parallel.model_copy(update={"tp": 1, "cp": 1, "pp": 1, "chunks": 1, "sequence_parallel": False})
    return config.model_copy(update={"parallel": kept})


def _initial_state(parts: Parts, seed: int) -> TrainState:
    return TrainState(weights={name: weight for model in parts.models for name, weight in model.initial_weights(seed).items()})


def _state_of(parts: Parts, checkpoint: Checkpoint) -> TrainState:
    """This rank's part of a checkpoint, one whole tensor in memory at a time."""
    owners = {name: model for model in parts.models for name, _ in model.named_parameters()}

    def own(section: str) -> dict[str, torch.Tensor]:
        # A copy where it is a part: a view would keep the whole tensor.
        return {name: owners[name].own_part(name, whole).clone() for name, whole in checkpoint.tensors(section) if name in owners}

    return TrainState(weights=own("weights"), exp_avg=own("exp_avg"), exp_avg_sq=own("exp_avg_sq"), steps_taken=checkpoint.manifest.step)
