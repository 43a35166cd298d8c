"""Mistakes of parallel training, planted while a context manager is entered: each what somebody has got wrong once.

They are applied inside the ranks, by ``mutants_program`` around ``layouts_program``: several mistakes share one launch. Nothing in the package
knows of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import ModelConfig
from dist_llm.data.rows import IGNORE, Batch
from dist_llm.engine import batches as engine_batches
from dist_llm.engine.base import DeviceBatch
from dist_llm.engine.deepspeed import DeepSpeedEngine
from dist_llm.layers import ring_attention as ring
from dist_llm.layers.dropout import Dropout
from dist_llm.layers.linear import Linear, RowParallelLinear
from dist_llm.layers.norm import LayerNorm, RMSNorm
from dist_llm.layers.region import TensorRegion
from dist_llm.models.block import Block
from dist_llm.models.decoder import Decoder
from dist_llm.parallel import divide
from dist_llm.parallel.tied_head import TiedHead
from dist_llm.planning import shards
from dist_llm.verify.program import layouts_program

__all__ = ["MUTANTS", "mutants_program", "pipeline_breaks_program", "row_sum_left_out_program"]

Mutant = Callable[[], contextlib.AbstractContextManager[None]]
MUTANTS: dict[str, Mutant] = {}


def mutants_program(ctx: ParallelContext, cases: Sequence[tuple[str, dict[str, Any]]], path: str, tolerance: float, done: str) -> list[Any]:
    """The answer of ``layouts_program`` for each pair of a mutant and a config."""
    answers = []
    for name, config in cases:
        with MUTANTS[name]():
            answers += layouts_program(ctx, [config], path, tolerance, done)
    return answers


def row_sum_left_out_program(ctx: ParallelContext, *args: Any) -> list[dict[str, Any]]:
    """``layouts_program`` with one of the mistakes, in the form that ``verify_layouts`` takes."""
    with MUTANTS["row_sum_left_out"]():
        return layouts_program(ctx, *args)


def pipeline_breaks_program(ctx: ParallelContext, *args: Any) -> list[dict[str, Any]]:
    """``layouts_program`` on ranks of which the last raises as soon as it is to work in a pipeline."""
    right = DeepSpeedEngine._pipelined

    def pipelined(self: DeepSpeedEngine, *rest: Any) -> torch.Tensor:
        if self._ctx.is_last_stage:
            raise RuntimeError("planted: no pipeline today")
        return right(self, *rest)

    with _replaced(DeepSpeedEngine, "_pipelined", pipelined):
        return layouts_program(ctx, *args)


def _mutant(plant: Callable[[], Iterator[None]]) -> Callable[[], Iterator[None]]:
    MUTANTS[plant.__name__] = contextlib.contextmanager(plant)
    return plant


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@_mutant
def nothing() -> Iterator[None]:
    """No mistake: what the others are measured against."""
    yield


# Tensor parallelism


class _NoSum(TensorRegion):
    """Keeps this rank's summand of a row-parallel product."""

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _NoSumBackward(TensorRegion):
    """Does not add up what the ranks' column-parallel matrices send back."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _in_block(number: int, change: Callable[[Block], None]) -> contextlib.AbstractContextManager[None]:
    """Every ``Block`` of that number is changed as soon as it is built."""
    build = Block.__init__

    def init(self: Block, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if kwargs["number"] == number:
            change(self)

    return _replaced(Block, "__init__", init)


def _fields(region: TensorRegion) -> dict[str, Any]:
    return {"tp": region.tp, "sequence": region.sequence, "kv": region.kv}


@_mutant
def row_sum_left_out() -> Iterator[None]:
    """The MLP of block 2 forgets the all-reduce of its row-parallel matrix."""

    def change(block: Block) -> None:
        block.mlp.down.region = _NoSum(**_fields(block.mlp.down.region))

    with _in_block(2, change):
        yield


@_mutant
def row_bias_on_every_rank() -> Iterator[None]:
    """Each rank adds the bias before the sum, which then has it tp times."""

    def forward(self: RowParallelLinear, x: torch.Tensor) -> torch.Tensor:
        return self.region.leave(F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)))

    with _replaced(RowParallelLinear, "forward", forward):
        yield


@_mutant
def column_gradient_not_summed() -> Iterator[None]:
    """What goes back out of the MLP of block 1 is one rank's part."""

    def change(block: Block) -> None:
        block.mlp.region = _NoSumBackward(**_fields(block.mlp.region))

    with _in_block(1, change):
        yield


@_mutant
def norms_not_synchronised() -> Iterator[None]:
    """Under sequence parallelism each rank keeps the gradient that its own tokens gave the norms."""

    def own(self: TensorRegion, parameter: torch.Tensor) -> torch.Tensor:
        return parameter

    right = {kind: kind.forward for kind in (RMSNorm, LayerNorm)}

    def forward(self: RMSNorm | LayerNorm, *inputs: torch.Tensor) -> Any:
        with _replaced(TensorRegion, "shared", own):
            return right[type(self)](self, *inputs)

    with _replaced(RMSNorm, "forward", forward), _replaced(LayerNorm, "forward", forward):
        yield


@_mutant
def wrong_key_value_heads() -> Iterator[None]:
    """With fewer key-value heads than ranks they are dealt out in turn, away from the query heads that read them."""

    def heads(num_kv_heads: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
        if num_kv_heads >= tp_size:
            return right(num_kv_heads, tp_size, tp_rank)
        return tp_rank % num_kv_heads, tp_rank % num_kv_heads + 1

    right = shards.kv_heads_of
    with _replaced(shards, "kv_heads_of", heads):
        yield


@_mutant
def key_value_copies_not_summed() -> Iterator[None]:
    """Each copy of a key-value head keeps the gradient of its own rank's queries."""
    with _replaced(Linear, "_whole", lambda self, parameter: parameter):
        yield


@_mutant
def vocabulary_off_by_one() -> Iterator[None]:
    """The loss takes a rank's columns for those one further on."""

    def shifted(vocab_size: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
        start, stop = shards.vocab_range(vocab_size, tp_size, tp_rank)
        return (start + 1, stop + 1) if tp_rank > 0 else (start, stop)

    with _replaced(divide, "vocab_range", shifted):
        yield


@_mutant
def norm_counts_replicated_twice() -> Iterator[None]:
    """Every rank counts every parameter it holds in the gradient norm, whole ones as often as there are ranks."""

    def mark(model: Decoder, ctx: ParallelContext) -> None:
        for parameter in model.parameters():
            parameter.model_parallel = True  # type: ignore[attr-defined]

    with _replaced(divide, "mark_counted", mark):
        yield


# Randomness


@_mutant
def dropout_differs_across_tp() -> Iterator[None]:
    """Tensor-parallel ranks drop different elements of the residual stream that they all hold."""

    class PerRank(Decoder):
        def __init__(self, config: ModelConfig, ops: Any, **options: Any) -> None:
            options["seed"] += options["region"].tp.rank
            super().__init__(config, ops, **options)

    with _replaced(divide, "Decoder", PerRank):
        yield


@_mutant
def recomputed_with_other_random_state() -> Iterator[None]:
    """The second forward of the same samples drops other elements than the first."""
    seen: set[tuple[int, ...]] = set()
    right = Dropout.forward

    def forward(self: Dropout, x: torch.Tensor, samples: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        key = (id(self), *samples.tolist())
        if key not in seen:
            seen.add(key)
            return right(self, x, samples, *more, **named)
        with _replaced(self, "seed", self.seed + 1):
            return right(self, x, samples, *more, **named)

    with _replaced(Dropout, "forward", forward):
        yield


# The scale of gradients


@_mutant
def gradients_scaled_by_stages() -> Iterator[None]:
    """The loss of a pipeline counts once for each stage."""
    right = DeepSpeedEngine._pipelined

    def pipelined(self: DeepSpeedEngine, pipeline: Any, batches: Sequence[DeviceBatch], factor: float) -> torch.Tensor:
        return right(self, pipeline, batches, factor * self._ctx.pp.size)

    with _replaced(DeepSpeedEngine, "_pipelined", pipelined):
        yield


@_mutant
def gradients_scaled_by_own_tokens() -> Iterator[None]:
    """Each data-parallel rank divides by its own number of valid targets, and the ranks are averaged."""
    right = DeepSpeedEngine.train_step

    def step(self: DeepSpeedEngine, batches: Sequence[DeviceBatch], *, num_tokens: int, lr: float) -> tuple[torch.Tensor, float]:
        own = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        return right(self, batches, num_tokens=max(1, own) * self._ctx.zero.size, lr=lr)

    with _replaced(DeepSpeedEngine, "train_step", step):
        yield


@_mutant
def mean_of_means() -> Iterator[None]:
    """Each micro-batch is divided by its own valid targets, and micro-batches and ranks are averaged."""
    step, back = DeepSpeedEngine.train_step, DeepSpeedEngine._backward
    factors: list[float] = []

    def train_step(self: DeepSpeedEngine, batches: Sequence[DeviceBatch], *, num_tokens: int, lr: float) -> tuple[torch.Tensor, float]:
        for batch in batches:
            own = max(1, int((batch.targets != IGNORE).sum()))
            factors.append(num_tokens / (own * len(batches) * self._ctx.zero.size))
        return step(self, batches, num_tokens=num_tokens, lr=lr)

    def backward(self: DeepSpeedEngine, loss: torch.Tensor) -> None:
        back(self, loss * factors.pop(0))

    with _replaced(DeepSpeedEngine, "train_step", train_step), _replaced(DeepSpeedEngine, "_backward", backward):
        yield


# Pipeline


@_mutant
def tied_gradient_not_summed() -> Iterator[None]:
    """The first stage drops the gradient that the head's use of the embedding gave it on the last."""
    right = TiedHead.receive_gradient
    with _replaced(TiedHead, "receive_gradient", lambda self: torch.zeros_like(right(self))):
        yield


@_mutant
def tied_head_goes_stale() -> Iterator[None]:
    """The last stage computes every step with the head of the first."""
    right = TiedHead.lend
    lent: set[TiedHead] = set()

    def lend(self: TiedHead) -> None:
        if self not in lent:
            lent.add(self)
            right(self)

    with _replaced(TiedHead, "lend", lend):
        yield


# Context parallelism


@_mutant
def ring_misses_a_step() -> Iterator[None]:
    """What the last step of the ring computed has no weight in the result."""
    right = divide.ring_attention

    def short(forward_fn: Any, backward_fn: Any, cp: Any) -> Any:
        calls = 0

        def forward(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal calls
            calls += 1
            out, lse = forward_fn(*args, **options)
            return out, torch.full_like(lse, float("-inf")) if calls % cp.size == 0 else lse

        return right(forward, backward_fn, cp)

    with _replaced(divide, "ring_attention", short):
        yield


@_mutant
def ring_loses_gradients_of_others() -> Iterator[None]:
    """Keys and values get the gradients of their own rank's queries alone."""
    right = divide.ring_attention

    def lossy(forward_fn: Any, backward_fn: Any, cp: Any) -> Any:
        def backward(*args: Any, causal: bool, **options: Any) -> tuple[torch.Tensor, ...]:
            dq, dk, dv = backward_fn(*args, causal=causal, **options)
            return (dq, dk, dv) if causal else (dq, torch.zeros_like(dk), torch.zeros_like(dv))

        return right(forward_fn, backward, cp)

    with _replaced(divide, "ring_attention", lossy):
        yield


@_mutant
def ring_forgets_documents() -> Iterator[None]:
    """Queries see the keys of other ranks whatever document they belong to."""
    right = ring._documents

    def documents(ids: torch.Tensor | None, here: int, source: int, *slices: slice) -> dict[str, torch.Tensor]:
        return right(ids, here, source, *slices) if source == here else {}

    with _replaced(ring, "_documents", documents):
        yield


@_mutant
def positions_begin_on_every_rank() -> Iterator[None]:
    """Each context-parallel rank counts the positions of its columns from zero."""
    right = engine_batches.to_device

    def to_device(batch: Batch, *args: Any, **options: Any) -> DeviceBatch:
        moved = right(batch, *args, **options)
        return replace(moved, positions=torch.arange(moved.tokens.shape[1]).expand_as(moved.tokens))

    with _replaced(engine_batches, "to_device", to_device):
        yield


# Windows


@_mutant
def window_by_place_on_the_stage() -> Iterator[None]:
    """Which layers have the window is counted from the first of a stage, not of the model."""
    build, right = Decoder.__init__, ModelConfig.layer_window

    def init(self: Decoder, config: ModelConfig, *args: Any, layers: range | None = None, **options: Any) -> None:
        def layer_window(model: ModelConfig, layer: int) -> int | None:
            return right(model, layer - (layers.start if layers is not None else 0))

        with _replaced(ModelConfig, "layer_window", layer_window):
            build(self, config, *args, layers=layers, **options)

    with _replaced(Decoder, "__init__", init):
        yield


@_mutant
def all_to_all_forgets_the_window() -> Iterator[None]:
    """What has exchanged heads for columns looks at whole rows."""
    right = divide.all_to_all_attention

    def all_to_all(fn: Callable[..., torch.Tensor], cp: Any) -> Any:
        return right(lambda *args, window=None, **options: fn(*args, **options), cp)

    with _replaced(divide, "all_to_all_attention", all_to_all):
        yield
