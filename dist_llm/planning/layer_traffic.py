"""What the layers of one rank send in one micro-batch: tensor parallelism, context parallelism and the loss.

Each line of code here is one collective of ``layers/``, forward or backward, in the order of a step. Activations travel in the
compute dtype; gradients of parameters that ranks share, and the pieces of the cross-entropy, in fp32.

B rows of the micro-batch, T columns on this rank, D model dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_llm.config.schema import RunConfig
from dist_llm.planning.count import parameter_shapes
from dist_llm.planning.shards import local_shape, vocab_range
from dist_llm.planning.wire import Counts, Traffic, add_counts, traffic
from dist_llm.topology.grid import RankGrid

__all__ = ["activation_bytes", "group_names", "layer_traffic"]

FP32 = 4
_DOC_ID_BYTES = 4


def activation_bytes(config: RunConfig) -> int:
    """Bytes of one element of an activation."""
    return 2 if config.precision == "bf16" else FP32


def group_names(grid: RankGrid, kv_heads: int | None = None) -> dict[str, str]:
    """Logical name of a group -> the name it goes by: groups of the same ranks are one, under the first of their names.

    The order is that of ``comm.build.build_context``.
    """
    axes = {"world": ("tp", "cp", "dp", "pp"), "tp": ("tp",), "cp": ("cp",), "pp": ("pp",), "dp": ("dp",), "zero": ("cp", "dp")}
    axes["model"] = ("tp", "pp")
    first: dict[frozenset[str], str] = {}
    names = {name: first.setdefault(frozenset(a for a in over if grid.sizes[a] > 1), name) for name, over in axes.items()}
    # Every head on all tp ranks: the copies are the tp group itself.
    names["kv"] = names["tp"] if kv_heads == 1 else "kv"
    return names | {"pp_back": "pp_back", "ends": "ends"}


@dataclass(frozen=True)
class _Sizes:
    """Bytes that the collectives of one rank are about."""

    residual: int  # B T D of the whole residual stream
    tokens: int  # B T
    tp: int
    cp: int
    sequence: bool


def layer_traffic(config: RunConfig, grid: RankGrid, *, blocks: range, is_first: bool, is_last: bool, tp_rank: int) -> Counts:
    """One micro-batch through one model part, forward and backward.

    Args:
        config: the run.
        grid: sizes of the axes.
        blocks: numbers of the part's blocks.
        is_first: it has the embedding.
        is_last: it has the final norm, the head and the loss.
        tp_rank: position among the tensor-parallel ranks.
    """
    model, parallel = config.model, config.parallel
    tokens = config.train.micro_batch_size * config.data.seq_len // grid.sizes["cp"]
    sizes = _Sizes(
        residual=tokens * model.d_model * activation_bytes(config),
        tokens=tokens,
        tp=grid.sizes["tp"],
        cp=grid.sizes["cp"],
        sequence=parallel.sequence_parallel and grid.sizes["tp"] > 1,
    )
    names = group_names(grid, model.kv_heads)
    recomputed = len(blocks) if parallel.recompute_layers is None else min(parallel.recompute_layers, len(blocks))
    many: list[Counts] = []
    if is_first:
        many.append(_leave(sizes, names))
    for i, _ in enumerate(blocks):
        what = parallel.recompute if i < recomputed else "none"
        many += [_tensor_parallel_block(config, sizes, names, full=what == "full")]
        many += [_context_parallel(config, sizes, names, again=what)]
    if is_last:
        many += [_enter(sizes, names), _cross_entropy(sizes, names)]
    many.append(_shared_gradients(config, sizes, names, blocks=blocks, is_first=is_first, is_last=is_last, tp_rank=tp_rank))
    return add_counts(*many)


def _enter(sizes: _Sizes, names: dict[str, str], *, forward: int = 1, backward: int = 1) -> Counts:
    """Into a divided matrix: nothing and an all-reduce, or an all-gather and a reduce-scatter."""
    tp, n = names["tp"], sizes.tp
    if not sizes.sequence:
        return {(tp, "all_reduce"): traffic("all_reduce", n, backward * sizes.residual, backward)}
    return {
        (tp, "all_gather"): traffic("all_gather", n, forward * sizes.residual, forward),
        (tp, "reduce_scatter"): traffic("reduce_scatter", n, backward * sizes.residual, backward),
    }


def _leave(sizes: _Sizes, names: dict[str, str], *, forward: int = 1, backward: int = 1) -> Counts:
    """Out of one: an all-reduce and nothing, or a reduce-scatter and an all-gather."""
    tp, n = names["tp"], sizes.tp
    if not sizes.sequence:
        return {(tp, "all_reduce"): traffic("all_reduce", n, forward * sizes.residual, forward)}
    return {
        (tp, "reduce_scatter"): traffic("reduce_scatter", n, forward * sizes.residual, forward),
        (tp, "all_gather"): traffic("all_gather", n, backward * sizes.residual, backward),
    }


def _tensor_parallel_block(config: RunConfig, sizes: _Sizes, names: dict[str, str], *, full: bool) -> Counts:
    # Attention and MLP enter and leave once each. Recomputation stops at the last tensor that backward needs: with dropout that is
    # the mask's positions, behind the MLP's sum over ranks; without, the input of the matrix before it.
    again_enter = 2 if full else 0
    again_leave = (2 if config.model.dropout > 0 else 1) if full else 0
    return add_counts(_enter(sizes, names, forward=2 + again_enter, backward=2), _leave(sizes, names, forward=2 + again_leave, backward=2))


def _context_parallel(config: RunConfig, sizes: _Sizes, names: dict[str, str], *, again: str) -> Counts:
    """Attention over columns of other ranks; ``again`` is what of the block is computed again in backward."""
    n, cp, act, model = sizes.cp, names["cp"], activation_bytes(config), config.model
    if n == 1:
        return {}
    passes = 1 if again == "none" else 2
    heads = model.num_heads // sizes.tp
    kv_heads = max(1, model.kv_heads // sizes.tp)
    ids = passes if config.data.document_mask else 0
    gathered = {(cp, "all_gather"): traffic("all_gather", n, ids * n * sizes.tokens * _DOC_ID_BYTES, ids)}
    if config.parallel.cp_kind == "ring":
        elements = 2 * sizes.tokens * kv_heads * model.head_size  # a key and a value
        # Keys and values go round once a pass and once in backward, where their gradients follow them in fp32.
        calls = (n - 1) * (passes + 2)
        payload = (n - 1) * elements * (act * (passes + 1) + FP32)
        sent = {(cp, kind): traffic(kind, n, payload, calls) for kind in ("send", "recv")}
        return add_counts(gathered, sent)
    group = heads // kv_heads
    copies = group // math.gcd(heads // n, group)
    inward = sizes.tokens * (heads + 2 * kv_heads * copies) * model.head_size * act
    outward = sizes.tokens * heads * model.head_size * act
    # Selective recomputation ends with what attention itself keeps, before its result travels back.
    outs = 1 if again in ("none", "selective") else 2
    exchanged = traffic("all_to_all", n, (passes + 1) * inward + (outs + 1) * outward, passes + outs + 2)
    return add_counts(gathered, {(cp, "all_to_all"): exchanged})


def _cross_entropy(sizes: _Sizes, names: dict[str, str]) -> Counts:
    # One number a row, the largest logit; then two, the sum of exponentials and the target's logit.
    return {(names["tp"], "all_reduce"): traffic("all_reduce", sizes.tp, 3 * sizes.tokens * FP32, 2)}


def _shared_gradients(
    config: RunConfig, sizes: _Sizes, names: dict[str, str], *, blocks: range, is_first: bool, is_last: bool, tp_rank: int
) -> Counts:
    """Parameters that ranks hold alike and use on different tokens or heads: their gradients are summed once a micro-batch."""
    model = config.model
    numbers = set(blocks)
    whole = Traffic()
    copied = Traffic()
    copies = max(1, sizes.tp // model.kv_heads)
    for name, shape in parameter_shapes(model).items():
        if name.startswith("blocks."):
            mine = int(name.split(".")[1]) in numbers
        else:
            mine = is_last if name.startswith(("final_norm", "head")) else is_first
        if not mine:
            continue
        local = math.prod(local_shape(name, shape, model, sizes.tp, tp_rank))
        if name.endswith(("key.weight", "key.bias", "value.weight", "value.bias")):
            copied += traffic("all_reduce", copies, local * FP32)
        elif sizes.sequence and local == math.prod(shape) and name not in ("embedding.weight", "head.weight"):
            whole += traffic("all_reduce", sizes.tp, local * FP32)
    return add_counts({(names["tp"], "all_reduce"): whole}, {(names["kv"], "all_reduce"): copied})


def vocabulary_rows(config: RunConfig, tp_size: int, tp_rank: int) -> int:
    """Rows of the embedding on a rank."""
    start, stop = vocab_range(config.model.vocab_size, tp_size, tp_rank)
    return stop - start
