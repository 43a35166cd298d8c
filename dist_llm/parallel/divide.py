"""How a config is divided over the ranks of a launch: the grid, the stages, and what attention and the loss become on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import ModelConfig, ParallelConfig, RunConfig
from dist_llm.kernels.cross_entropy.reference import CrossEntropyFn
from dist_llm.kernels.impl import Impl
from dist_llm.layers.all_to_all_attention import all_to_all_attention
from dist_llm.layers.cross_entropy import VocabParallelCrossEntropy
from dist_llm.layers.region import TensorRegion
from dist_llm.layers.ring_attention import ring_attention
from dist_llm.models.decoder import Decoder, Recompute
from dist_llm.models.ops import Ops
from dist_llm.planning.shards import tensor_slice, vocab_range
from dist_llm.planning.stages import stage_layers
from dist_llm.topology.grid import RankGrid
from dist_llm.topology.sequence import columns_of_rank

__all__ = ["Parts", "build_parts", "columns_of", "grid_of", "mark_counted"]


def grid_of(parallel: ParallelConfig, world_size: int) -> RankGrid:
    """The rank grid of a launch: data parallelism takes what the other axes leave.

    Raises:
        ValueError: they do not divide the world; ``config.rules.problems_for_ranks`` says so first, to a user.
    """
    model = parallel.tp * parallel.cp * parallel.pp
    if world_size % model != 0:
        raise ValueError(f"{world_size} ranks must be divisible by tp x cp x pp = {model}")
    return RankGrid({"tp": parallel.tp, "cp": parallel.cp, "dp": world_size // model, "pp": parallel.pp})


def columns_of(parallel: ParallelConfig, ctx: ParallelContext, seq_len: int) -> list[range]:
    """The columns of a row of ``seq_len`` tokens that this rank holds, in order."""
    return columns_of_rank(seq_len, ctx.cp.size, ctx.cp.rank, zigzag=parallel.cp_kind == "ring")


@dataclass(frozen=True)
class Parts:
    """What one rank holds of a model: one part, or several with an interleaved pipeline, and the loss of the last one."""

    models: list[Decoder]
    cross_entropy: CrossEntropyFn


def build_parts(config: RunConfig, ctx: ParallelContext, chosen: dict[str, Impl], *, compute_dtype: torch.dtype) -> Parts:
    """This rank's part of the model with empty parameters, on CPU."""
    parallel = config.parallel
    copies = max(1, ctx.tp.size // config.model.kv_heads)
    # A context that was built for another model would leave the gradients of copied heads unsummed, and say nothing.
    assert ctx.kv.size == copies, (
        f"groups of {ctx.kv.size} for {copies} copies of a key-value head: build_context wants this model's kv_heads"
    )
    region = TensorRegion(tp=ctx.tp, sequence=parallel.sequence_parallel and ctx.tp.size > 1, kv=ctx.kv)
    ops = Ops.of(chosen, attention=_attention(parallel, ctx, chosen))
    stages = stage_layers(config.model, config.data.seq_len, ctx.pp.size * parallel.chunks)
    models = [
        Decoder(
            config.model,
            ops,
            compute_dtype=compute_dtype,
            recompute=Recompute(parallel.recompute, parallel.recompute_layers),
            region=region,
            layers=stages[chunk * ctx.pp.size + ctx.pp.rank],
            seed=config.seed,
            joint=parallel.zero < 3,
        )
        for chunk in range(parallel.chunks)
    ]
    for model in models:
        mark_counted(model, ctx)
    return Parts(models, _cross_entropy(config.model, ctx, chosen))


def mark_counted(model: Decoder, ctx: ParallelContext) -> None:
    """Mark the parameters whose gradient this rank counts in the global norm: every logical element once.

    ``model_parallel`` is the name DeepSpeed looks for; without it, it counts a parameter on tensor-parallel rank 0 only.
    """
    for name, parameter in model.named_parameters():
        part = tensor_slice(name, model.config, ctx.tp.size, ctx.tp.rank)
        parameter.model_parallel = part is not None and part.copy == 0  # type: ignore[attr-defined]


def _attention(parallel: ParallelConfig, ctx: ParallelContext, chosen: dict[str, Impl]) -> Callable[..., Any]:
    if ctx.cp.size == 1:
        return chosen["attention"].fn
    if parallel.cp_kind == "all_to_all":
        return all_to_all_attention(chosen["attention"].fn, ctx.cp)
    return ring_attention(chosen["attention_block"].fn, chosen["attention_block_backward"].fn, ctx.cp)


def _cross_entropy(model: ModelConfig, ctx: ParallelContext, chosen: dict[str, Impl]) -> CrossEntropyFn:
    if ctx.tp.size == 1:
        return chosen["cross_entropy"].fn
    return VocabParallelCrossEntropy(
        tp=ctx.tp,
        vocab_start=vocab_range(model.vocab_size, ctx.tp.size, ctx.tp.rank)[0],
        partials=chosen["cross_entropy_partials"].fn,
        backward=chosen["cross_entropy_backward"].fn,
    )
