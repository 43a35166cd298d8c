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
from dist_llm.models.block import Ops
from dist_llm.models.decoder import Decoder
from dist_llm.utils.errors import ConfigError, LaunchError

__all__ = ["build_engine", "build_model", "choose_ops", "compute_dtype", "ops_of", "uses_deepspeed"]


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
    chosen = choices(ctx.device, compute_dtype(config), config.kernels.model_dump())
    mine = {op: impl.name for op, impl in chosen.items()}
    for rank, theirs in enumerate(gather_json(mine, ctx.world, ctx.device)):
        if theirs != mine:
            raise LaunchError(
                f"rank {rank} would compute with {theirs}, rank {ctx.world.rank} with {mine}; "
                "build the extension on every node, or name the implementations under kernels: in the config"
            )
    return chosen


def ops_of(chosen: dict[str, Impl]) -> Ops:
    """The functions of the chosen implementations."""
    return Ops(rms_norm=chosen["rms_norm"].fn, attention=chosen["attention"].fn, cross_entropy=chosen["cross_entropy"].fn)


def build_model(config: RunConfig, chosen: dict[str, Impl]) -> Decoder:
    """The model with empty parameters, on CPU."""
    return Decoder(config.model, ops_of(chosen), compute_dtype=compute_dtype(config), recompute=config.parallel.recompute == "full")


def build_engine(config: RunConfig, ctx: ParallelContext, chosen: dict[str, Impl], checkpoint: Checkpoint | None) -> Engine:
    """The engine of this run with its state in place."""
    model = build_model(config, chosen)
    if checkpoint is None:
        state = TrainState(weights=model.initial_weights(config.seed))
    else:
        state = TrainState(
            weights=dict(checkpoint.tensors("weights")),
            exp_avg=dict(checkpoint.tensors("exp_avg")),
            exp_avg_sq=dict(checkpoint.tensors("exp_avg_sq")),
            steps_taken=checkpoint.manifest.step,
        )
    loss_module = LossModule(model.to(ctx.device), ops_of(chosen).cross_entropy)
    if uses_deepspeed(config, ctx.world.size):
        from dist_llm.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(loss_module, config, state, ctx)
    return PlainEngine(loss_module, config.optim, state)
