"""Which tensors a pipeline stage of a ``ModelShape`` holds on one tensor-parallel rank: sizes and how many of each.

The same tensors as ``planning.count.parameter_shapes`` and ``planning.shards`` give for a config, found without listing names, so
that a search can ask a hundred thousand times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from dist_llm.planning.shapes import ModelShape, attended
from dist_llm.topology.stages import cut_stages

__all__ = ["Stage", "StageTensors", "Tensor", "is_moe_layer", "layer_ranges", "stages_of", "tensors_of"]


class Tensor(NamedTuple):
    """``copies`` tensors of ``size`` elements; ``decayed``: a matrix, a group of the optimiser apart; ``expert``: divided over ep."""

    size: int
    decayed: bool
    copies: int = 1
    expert: bool = False


@dataclass(frozen=True)
class Stage:
    """One pipeline rank: the dense and expert layers of each of its chunks, how many of both have a window, and which ends of the model it has."""

    number: int
    dense: tuple[int, ...]  # by chunk
    moe: tuple[int, ...]
    windowed: tuple[int, ...]
    is_first: bool
    is_last: bool

    @property
    def layers(self) -> int:
        """Blocks of all chunks."""
        return sum(self.dense) + sum(self.moe)


def is_moe_layer(model: ModelShape, layer: int) -> bool:
    """Whether block ``layer`` has experts; ``ModelShape`` says which do."""
    return model.num_experts > 0 and layer >= model.dense_layers and (layer - model.dense_layers + 1) % model.moe_every == 0


@lru_cache(maxsize=1024)
def layer_ranges(model: ModelShape, parts: int) -> tuple[range, ...]:
    """Numbers of the blocks of each of ``parts`` stages, cut so that the dearest stage is as cheap as can be.

    Cost is matrix multiply-adds a token; the head counts on the last stage, a look-up on the first costs nothing.

    Raises:
        ValueError: more stages than layers.
    """
    experts = (model.experts_per_token + model.shared_experts) * model.expert_weights + model.router_weights
    head_dims = model.num_heads * model.head_dim
    costs = []
    for layer in range(model.num_layers):
        weights = model.attention_weights + (experts if is_moe_layer(model, layer) else model.mlp_weights)
        # Scores and weighted sum over the causal half of the row: 2 x T/2 multiply-adds a head dimension, fewer with a window.
        costs.append(float(weights + head_dims * attended(model.layer_window(layer), model.seq_len)))
    return cut_stages(costs, parts, last=float(model.head_weights))


@lru_cache(maxsize=4096)
def stages_of(model: ModelShape, pp: int, virtual_pp: int = 1, *, even: bool = False) -> tuple[Stage, ...]:
    """The stages of ``model``, cut as the trainer cuts them (``planning.stages.stage_layers``): the dearest stage as cheap as can be.

    Args:
        model: the whole model.
        pp: pipeline ranks.
        virtual_pp: stages a rank holds.
        even: as many layers on every stage instead. Where they do not divide, embedding and head take the place of a layer if
            that comes out even (an option of Megatron-LM), else the first stages have one more.

    Raises:
        ValueError: more stages than layers.
    """
    parts = pp * virtual_pp
    ranges = _even_ranges(model.num_layers, parts) if even else layer_ranges(model, parts)
    windowed = [sum(model.layer_window(i) is not None for i in layers) for layers in ranges]
    moe = [sum(is_moe_layer(model, i) for i in layers) for layers in ranges]
    return tuple(
        Stage(
            number=rank,
            dense=tuple(len(ranges[c * pp + rank]) - moe[c * pp + rank] for c in range(virtual_pp)),
            moe=tuple(moe[c * pp + rank] for c in range(virtual_pp)),
            windowed=tuple(windowed[c * pp + rank] for c in range(virtual_pp)),
            is_first=rank == 0,
            is_last=rank == pp - 1,
        )
        for rank in range(pp)
    )


def _even_ranges(num_layers: int, parts: int) -> tuple[range, ...]:
    if num_layers % parts and (num_layers + 2) % parts == 0:
        counts = [(num_layers + 2) // parts] * parts
        counts[0] -= 1
        counts[-1] -= 1
    else:
        counts = [num_layers // parts + (i < num_layers % parts) for i in range(parts)]
    starts = [sum(counts[:i]) for i in range(parts)]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))


@dataclass(frozen=True)
class StageTensors:
    """Tensors of one rank of a stage, in the order of the module: what stands before the blocks, one block of each kind, the rest."""

    front: tuple[Tensor, ...]
    dense: tuple[Tensor, ...]
    num_dense: int
    moe: tuple[Tensor, ...]
    num_moe: int
    back: tuple[Tensor, ...]
    lent_head: int  # elements of a tied head whose embedding is another stage's

    def counted(self) -> Iterator[tuple[Tensor, int]]:
        """Each kind of tensor and how many there are."""
        for tensors, count in ((self.front, 1), (self.dense, self.num_dense), (self.moe, self.num_moe), (self.back, 1)):
            if count:
                for tensor in tensors:
                    yield tensor, tensor.copies * count

    def in_order(self, *, decayed: bool) -> list[int]:
        """Sizes of one optimiser group, one by one; blocks with experts after the dense ones."""
        parts = (self.front, self.dense * self.num_dense, self.moe * self.num_moe, self.back)
        return [t.size for part in parts for t in part if t.decayed == decayed for _ in range(t.copies)]


@lru_cache(maxsize=4096)
def tensors_of(model: ModelShape, stage: Stage, tp: int, ep: int = 1, tp_rank: int = 0) -> StageTensors:
    """Tensors of one rank of ``stage``.

    Args:
        model: the whole model.
        stage: of ``stages_of``.
        tp: tensor-parallel ranks.
        ep: ranks that share the experts.
        tp_rank: which of the tensor-parallel ranks; rank 0 has the largest part of the vocabulary.
    """
    d = model.d_model
    part = -(-model.vocab_size // tp)
    rows = min(model.vocab_size, (tp_rank + 1) * part) - min(model.vocab_size, tp_rank * part)
    front = [Tensor(rows * d, True), Tensor(model.learned_positions * d, True)] if stage.is_first else []
    back: list[Tensor] = []
    if stage.is_last:
        back = [*_norm(model), *([] if model.tied else [Tensor(rows * d, True)])]
    return StageTensors(
        front=tuple(t for t in front if t.size),
        dense=tuple(t for t in _block(model, tp, ep, moe=False) if t.size),
        num_dense=sum(stage.dense),
        moe=tuple(t for t in _block(model, tp, ep, moe=True) if t.size and t.copies) if sum(stage.moe) else (),
        num_moe=sum(stage.moe),
        back=tuple(back),
        lent_head=rows * d if model.tied and stage.is_last and not stage.is_first else 0,
    )


def _norm(model: ModelShape) -> list[Tensor]:
    return [Tensor(model.d_model, False)] * (2 if model.norm == "layer_norm" and model.bias else 1)


def _linear(model: ModelShape, inputs: int, outputs: int, *, copies: int = 1, expert: bool = False) -> list[Tensor]:
    weight = Tensor(inputs * outputs, True, copies, expert)
    return [weight, Tensor(outputs, False, copies, expert)] if model.bias else [weight]


def _block(model: ModelShape, tp: int, ep: int, *, moe: bool) -> list[Tensor]:
    d = model.d_model
    query = model.num_heads // tp * model.head_dim
    key = max(1, model.num_kv_heads // tp) * model.head_dim
    tensors = _norm(model)
    if model.attention_matrix:
        tensors.append(Tensor(model.attention_matrix // tp, True))
    else:
        tensors += [*_linear(model, d, query), *_linear(model, d, key), *_linear(model, d, key), *_linear(model, query, d)]
    tensors += _norm(model)
    if not moe:
        return tensors + _mlp(model, model.ffn_dim // tp)
    tensors.append(Tensor(model.router_weights, True))
    # Experts are whole on the rank that has them; the shared ones are divided like any MLP.
    tensors += _mlp(model, model.expert_ffn, copies=model.num_experts // ep, expert=True)
    return tensors + _mlp(model, model.expert_ffn // tp, copies=model.shared_experts)


def _mlp(model: ModelShape, hidden: int, *, copies: int = 1, expert: bool = False) -> list[Tensor]:
    d = model.d_model
    gate = _linear(model, d, hidden, copies=copies, expert=expert) if model.gated else []
    return gate + _linear(model, d, hidden, copies=copies, expert=expert) + _linear(model, hidden, d, copies=copies, expert=expert)
