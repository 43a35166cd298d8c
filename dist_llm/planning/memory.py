"""Bytes a rank needs for a run that a config describes, and bytes on disk for its checkpoints.

The arithmetic is that of ``planning.rank_memory``, whose figures are exact for states; here a config becomes its shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_llm.config.schema import RunConfig
from dist_llm.planning.bookkeeping import OURS
from dist_llm.planning.count import count_params
from dist_llm.planning.implementations import Device
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.rank_memory import RankBytes, memory_of
from dist_llm.planning.saving import Kernels, saving_of
from dist_llm.planning.shapes import from_config
from dist_llm.planning.stage_tensors import stages_of
from dist_llm.planning.state_bytes import StateBytes, state_bytes

__all__ = ["RankMemory", "checkpoint_bytes", "layout_of", "rank_bytes", "rank_memory", "rank_states"]


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank: tensors only, without communication buffers, the device's context and the allocator's share."""

    parameters: int
    gradients: int
    optimizer: int  # fp32 masters where they are a second copy, and two moments
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits


def rank_memory(config: RunConfig, ranks: int, *, plain: bool, device: Device = "cuda") -> RankMemory:
    """What the fullest rank keeps.

    Args:
        config: the run.
        ranks: of the launch; data parallelism takes what tp, cp and pp leave of them.
        plain: the plain engine, which divides nothing and keeps only fp32 parameters.
        device: kind of device of the ranks, which decides what ``kernels.*: auto`` takes.
    """
    full = rank_bytes(config, ranks, plain=plain, device=device)
    return RankMemory(full.parameters, full.gradients, full.masters + full.optimizer, full.activations, full.logits)


def rank_bytes(config: RunConfig, ranks: int, *, plain: bool = False, stage: int | None = None, device: Device = "cuda") -> RankBytes:
    """All that a rank of ``stage`` (default: the fullest) needs, buffers and slack included; arguments as ``rank_memory``."""
    parallel, model = config.parallel, from_config(config.model, config.data.seq_len)
    return memory_of(
        model,
        layout_of(config, ranks, plain=plain),
        precision=config.precision,
        stage=stage,
        saving=saving_of(Kernels.of(config), model, device, config.precision),
        bookkeeping=OURS,
        recompute_layers=parallel.recompute_layers,
        exchanges_heads=parallel.cp_kind == "all_to_all" and not plain,
        offload_optimizer=parallel.offload_optimizer != "none" and not plain,
        offload_parameters=parallel.offload_parameters != "none" and not plain,
        overlaps=device == "cuda",  # the engine overlaps communication with the backward there
    )


def rank_states(config: RunConfig, ranks: int, *, stage: int = 0, tp_rank: int = 0, zero_rank: int = 0, plain: bool = False) -> StateBytes:
    """States of one rank, to the byte.

    Args:
        config: the run.
        ranks: of the launch.
        stage: pipeline rank.
        tp_rank: tensor-parallel rank.
        zero_rank: rank among those that ZeRO divides over, dp x cp.
        plain: as in ``rank_memory``.
    """
    model, layout, parallel = from_config(config.model, config.data.seq_len), layout_of(config, ranks, plain=plain), config.parallel
    return state_bytes(
        model,
        stages_of(model, layout.pp, layout.virtual_pp)[stage],
        tp=layout.tp,
        ep=1,
        zero=layout.zero,
        zero_ranks=layout.dp * layout.cp,
        expert_ranks=1,
        bf16=config.precision == "bf16",
        tp_rank=tp_rank,
        zero_rank=zero_rank,
        offload_optimizer=parallel.offload_optimizer != "none" and not plain,
        offload_parameters=parallel.offload_parameters != "none" and not plain,
    )


def layout_of(config: RunConfig, ranks: int, *, plain: bool = False) -> LayoutShape:
    """The layout of ``config`` on ``ranks`` ranks; the plain engine's is that of one rank.

    Raises:
        ValueError: the axes do not divide the ranks.
    """
    p, train = config.parallel, config.train
    if plain:
        return LayoutShape(
            zero=0, micro_batch=train.micro_batch_size, global_batch=train.batch_size, recompute=p.recompute,
            precision=config.precision, sequence_parallel=False,
        )  # fmt: skip
    axes = p.tp * p.cp * p.pp
    if ranks % axes != 0:
        raise ValueError(f"{ranks} ranks must be divisible by parallel.tp x cp x pp = {axes}")
    return LayoutShape(
        tp=p.tp, pp=p.pp, cp=p.cp, dp=ranks // axes, zero=p.zero, micro_batch=train.micro_batch_size, global_batch=train.batch_size,
        virtual_pp=p.chunks, recompute=p.recompute, precision=config.precision, sequence_parallel=p.sequence_parallel and p.tp > 1,
    )  # fmt: skip


def checkpoint_bytes(config: RunConfig) -> int:
    """Size of one checkpoint: masters and two moments in fp32."""
    return 12 * count_params(config.model).total
