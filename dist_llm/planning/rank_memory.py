"""Bytes that one rank needs, from the shapes of model and layout alone: quick enough for a search, exact where counting is possible.

States (parameters, gradients, masters, moments) are those of the engine, padding included, as they are at the end of a step's
last backward; tests count them on running ranks. Activations are what autograd keeps (``planning.activations``) times the
micro-batches in flight. Buffers and slack are what DeepSpeed's defaults and an allocator need besides.
docs/planning/memory.md has the table of what exists when.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dist_llm.planning.activations import Kept, kept_for_backward
from dist_llm.planning.bookkeeping import OURS, Bookkeeping
from dist_llm.planning.in_flight import in_flight
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.saving import AUTO, Saving, saving_of
from dist_llm.planning.shapes import ModelShape
from dist_llm.planning.stage_tensors import Stage, StageTensors, stages_of, tensors_of
from dist_llm.planning.state_bytes import StateBytes, state_bytes

__all__ = ["RankBytes", "memory_of"]

_ELEMENT = {"fp32": 4}  # bytes of an activation; two in all other precisions


@dataclass(frozen=True)
class RankBytes:
    """Bytes on one rank of pipeline stage ``stage``.

    optimizer: both moments. masters: the fp32 copy of the parameters where there is one. activations: kept for the backward, of all
    micro-batches in flight. logits: of the head, and their gradient. buffers: communication, gathered layers, and gradients of
    activations in passage. slack: the device's context and what an allocator cannot use.
    """

    parameters: int
    gradients: int
    optimizer: int
    masters: int
    activations: int
    logits: int
    buffers: int
    slack: int
    stage: int = 0

    @property
    def states(self) -> int:
        """What lives from step to step, and the gradients."""
        return self.parameters + self.gradients + self.optimizer + self.masters

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.states + self.activations + self.logits + self.buffers + self.slack


def memory_of(
    model: ModelShape,
    layout: LayoutShape,
    *,
    precision: str = "bf16",
    stage: int | None = None,
    bookkeeping: Bookkeeping = OURS,
    saving: Saving | None = None,
    recompute_layers: int | None = None,
    exchanges_heads: bool = False,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    overlaps: bool = True,
) -> RankBytes:
    """Bytes on the rank that needs most: of one pipeline stage, or of the fullest.

    Args:
        model: the whole model.
        layout: sizes of the axes and of the batch; ZeRO stage and recomputation.
        precision: of the computation; fp32, or any other with two bytes an activation.
        stage: number of the pipeline stage; default the fullest.
        bookkeeping: bytes a parameter; default the trainer's own.
        saving: what layers save; default the bookkeeping's, of the trainer's own what they save on a GPU with nothing said of kernels.
        recompute_layers: blocks of each chunk that the layout's recomputation applies to; default all.
        exchanges_heads: context parallelism exchanges heads for columns, which keeps attention's result twice.
        offload_optimizer: masters, moments and gradient sums are kept on the host.
        offload_parameters: ZeRO-3's parts of the parameters are.
        overlaps: gradients are summed while the backward runs, as on CUDA.

    Raises:
        ValueError: more stages than layers, or no such stage.
    """
    stages = stages_of(model, layout.pp, layout.virtual_pp, even=bookkeeping.even_stages)
    size = _ELEMENT.get(precision, 2)
    saving = saving or (saving_of(AUTO, model, "cuda", precision) if bookkeeping.own else bookkeeping.saving)
    if bookkeeping.own and layout.zero == 0:
        saving = _casting(saving)  # the parameters are fp32 there, see engine/deepspeed.py
    kept = kept_for_backward(model, layout, size, saving, exchanges_heads)
    if stage is not None:
        if not 0 <= stage < layout.pp:
            raise ValueError(f"stage {stage} is outside a pipeline of {layout.pp} stages")
        candidates: tuple[Stage, ...] = (stages[stage],)
    else:
        candidates = _candidates(stages)
    found = None
    for candidate in candidates:
        states = _states(model, candidate, layout, precision, bookkeeping, offload_optimizer, offload_parameters, overlaps)
        rank = _on_stage(model, candidate, layout, kept, states, bookkeeping, recompute_layers)
        if found is None or rank.total > found.total:
            found = rank
    assert found is not None
    return found


@lru_cache(maxsize=64)
def _casting(saving: Saving) -> Saving:
    return Saving(**{**saving.__dict__, "casts_weights": True})


@lru_cache(maxsize=4096)
def _candidates(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Stages of which one is the fullest: of those with equal contents the first, which has most micro-batches in flight."""
    seen: dict[tuple[object, ...], Stage] = {}
    for stage in stages:
        seen.setdefault((stage.dense, stage.moe, stage.windowed, stage.is_first, stage.is_last), stage)
    return tuple(seen.values())


def _states(
    model: ModelShape,
    stage: Stage,
    layout: LayoutShape,
    precision: str,
    bookkeeping: Bookkeeping,
    offload_optimizer: bool,
    offload_parameters: bool,
    overlaps: bool,
) -> StateBytes:
    ranks = layout.dp * layout.cp
    expert_ranks = max(1, ranks * layout.tp // layout.ep)
    if layout.zero == 3:
        expert_ranks, ranks = min(expert_ranks, layout.shard_ranks), layout.shard_ranks
    if bookkeeping.own:
        return state_bytes(
            model,
            stage,
            tp=layout.tp,
            ep=layout.ep,
            zero=layout.zero,
            zero_ranks=ranks,
            expert_ranks=expert_ranks,
            bf16=precision != "fp32",
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            overlaps=overlaps,
        )
    return _published_states(model, stage, layout.tp, layout.ep, layout.zero, ranks, expert_ranks, bookkeeping)


@lru_cache(maxsize=4096)
def _published_states(
    model: ModelShape, stage: Stage, tp: int, ep: int, zero: int, ranks: int, expert_ranks: int, books: Bookkeeping
) -> StateBytes:
    tensors = tensors_of(model, stage, tp, ep)
    whole = dict.fromkeys((1, 2, 3), 0.0)  # elements that a rank keeps of what ZeRO stage 1, 2 or 3 divides
    for tensor, count in tensors.counted():
        elements = tensor.size * count / (tp if tensor.expert and books.divides_experts else 1)
        for divided_from in whole:
            whole[divided_from] += elements / ((expert_ranks if tensor.expert else ranks) if zero >= divided_from else 1)
    gathered = books.gathered_layers * _largest_block(tensors) * 2 if zero == 3 else 0
    lent = int((books.weight + books.gradient) * tensors.lent_head)
    return StateBytes(
        parameters=int(books.weight * whole[3]) + lent,
        gradients=int(books.gradient * whole[2]),
        masters=int(books.master * whole[1]),
        moments=int(books.moments * whole[1]),
        buffers=gathered,
    )


def _largest_block(tensors: StageTensors) -> int:
    return max(sum(t.size * t.copies for t in part) for part in (tensors.front, tensors.dense, tensors.moe, tensors.back))


def _on_stage(
    model: ModelShape,
    stage: Stage,
    layout: LayoutShape,
    kept: Kept,
    states: StateBytes,
    books: Bookkeeping,
    recompute_layers: int | None,
) -> RankBytes:
    flights = in_flight(layout.pp, layout.virtual_pp, layout.num_micro, stage.number)
    last_chunk = layout.virtual_pp - 1
    activations = kept.layer_again if not sum(stage.moe) else max(kept.layer_again * bool(sum(stage.dense)), kept.expert_layer_again)
    if any(stage.windowed):
        activations += kept.window_again
    logits = 0
    buffers = kept.working
    for chunk, flying in enumerate(flights):
        dense, moe, windowed = stage.dense[chunk], stage.moe[chunk], stage.windowed[chunk]
        bytes_of_one = dense * kept.layer + moe * kept.expert_layer + windowed * kept.window + kept.shared
        if recompute_layers is not None:
            whole = max(0, dense + moe - recompute_layers)  # blocks at the end of the chunk that keep everything
            bytes_of_one += min(whole, moe) * (kept.expert_layer_whole - kept.expert_layer)
            bytes_of_one += max(0, whole - moe) * (kept.layer_whole - kept.layer)
            bytes_of_one += min(whole, windowed) * (kept.window_whole - kept.window)
        if stage.is_first and chunk == 0:
            bytes_of_one += kept.first
        if stage.is_last and chunk == last_chunk:
            bytes_of_one += kept.last + (kept.lent_head if model.tied and not stage.is_first else 0)
            logits = flying * kept.logits + kept.logits_working  # those in flight, and the gradient of one
        elif layout.pp > 1 and books.keeps_outputs:
            buffers += flying * kept.stream
        activations += flying * bytes_of_one
    if layout.pp > 1:
        buffers += 2 * kept.stream  # one arriving, one leaving
        if stage.is_first and model.tied:
            buffers += 4 * -(-model.vocab_size // layout.tp) * model.d_model  # the head's share of the embedding's gradient
    buffers += states.buffers
    # Either the backward is the fullest moment or, with few activations, the optimiser's step.
    buffers = max(buffers, states.at_step - activations - logits)
    tensors = states.parameters + states.gradients + states.masters + states.moments + activations + logits + buffers
    return RankBytes(
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.moments,
        masters=states.masters,
        activations=activations,
        logits=logits,
        buffers=buffers,
        slack=books.context + int(books.unused * tensors),
        stage=stage.number,
    )
