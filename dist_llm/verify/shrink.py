"""A small copy of a user's config with the same structure: what is compared is the arithmetic, and that does not need the size.

Kept: kinds of norm, position, activation, biases, ties, document mask, dropout, grouped or multi query heads, a head size that is not
d_model / num_heads, optimiser settings, muP's factors, kernels. Made small: widths, layers, vocabulary, rows and the window in them, batch.
"""

from __future__ import annotations

from collections.abc import Iterable

from dist_llm.config.rules import broken_rules, problems_for_ranks
from dist_llm.config.schema import ModelConfig, RunConfig
from dist_llm.topology.layout import Layout

__all__ = ["MAX_RANKS", "apply_layout", "own_layout", "refusal", "shrink"]

MAX_RANKS = 8  # on one machine; a layout of more ranks is brought down to it
_HEAD = 16
_SEQ_LEN = 32
_MAX_HEADS = 16
_MAX_LAYERS = 16
# Odd, so that the parts of a vocabulary divided over ranks are not all of one size.
_VOCAB = 250


def shrink(config: RunConfig, layouts: Iterable[Layout] = ()) -> RunConfig:
    """The small copy, in fp32 on one rank, with a constant rate of 3e-4 and eps 1e-5.

    AdamW divides by the root of the second moment plus eps: a gradient that is zero in theory and rounding noise in practice
    (a key bias) would, at eps 1e-8, become a step of full size in a random direction. At 1e-5 too, noise of small gradients
    becomes a difference of weights in proportion to the rate, which therefore is a small one.

    Args:
        config: a user's, on any layout.
        layouts: that are to be compared: the copy has enough layers for their stages, and enough heads where ``config`` has.
    """
    model, parallel = config.model, config.parallel
    asked = [own_layout(config), *layouts]
    group = model.num_heads // model.kv_heads
    if group == 1:
        heads, kv_heads = 4, 4
    elif model.kv_heads == 1:
        heads, kv_heads = 4, 1
    else:
        group = min(group, 4)
        kv_heads = 2
        heads = kv_heads * group if group in (2, 4) else 4 * group
        kv_heads = heads // group
    # Ranks that divide the heads of the config divide those of the copy: it has twice as many until they do.
    shares = [x.tp * (x.cp if x.cp_kind == "all_to_all" else 1) for x in asked]
    for share in shares:
        while heads % share != 0 and model.num_heads % share == 0 and heads < _MAX_HEADS:
            heads, kv_heads = 2 * heads, kv_heads if model.kv_heads == 1 else 2 * kv_heads
    natural = model.d_model == model.num_heads * model.head_size
    width = heads * _HEAD if natural else heads * _HEAD * 3 // 4
    ffn = max(32, round(width * model.ffn_size / model.d_model / 16) * 16)
    small = model.model_copy(
        update={
            "vocab_size": min(model.vocab_size, _VOCAB),
            "d_model": width,
            "num_layers": max(4, min(_MAX_LAYERS, max(x.pp * x.chunks for x in asked))),
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": _HEAD,
            "ffn_dim": ffn,
            "max_seq_len": _SEQ_LEN,
            "window": _window(config),
            **_base_sizes(model, width),
        }
    )
    return config.model_copy(
        update={
            "precision": "fp32",
            "model": small,
            "data": config.data.model_copy(update={"path": None, "seq_len": _SEQ_LEN}),
            "train": config.train.model_copy(update={"steps": 3, "batch_size": 8, "micro_batch_size": 2, "engine": "auto", "threads": 1}),
            "optim": config.optim.model_copy(
                update={"lr": 3e-4, "schedule": "constant", "warmup_steps": 0, "decay_steps": None, "eps": 1e-5}
            ),
            "parallel": type(parallel)(),
        }
    )


def _window(config: RunConfig) -> int | None:
    """The same share of the small rows; at least two tokens where it was, so that attention has something to choose from."""
    window = config.model.window
    return None if window is None else min(window, max(2, round(window * _SEQ_LEN / config.data.seq_len)))


def _base_sizes(model: ModelConfig, width: int) -> dict[str, int]:
    """muP's base of the small copy: as much narrower than it as the base is than ``model``, so that every factor stays."""
    if model.mup_base_width is None:
        return {}
    return {
        "mup_base_width": max(1, round(width * model.mup_base_width / model.d_model)),
        "mup_base_head_dim": max(1, round(_HEAD * model.mup_base_head_size / model.head_size)),
    }


def own_layout(config: RunConfig) -> Layout:
    """The config's own layout, axes halved where needed until it fits this machine's ``MAX_RANKS``."""
    p = config.parallel
    sizes = {"dp": p.dp or (2 if p.zero > 0 and p.tp * p.cp * p.pp > 1 else 1), "cp": p.cp, "pp": p.pp, "tp": p.tp}
    for axis in sizes:  # a power of two at most 4, as the small copy divides
        sizes[axis] = min(4, 1 << (sizes[axis].bit_length() - 1))
    while sizes["dp"] * sizes["cp"] * sizes["pp"] * sizes["tp"] > MAX_RANKS:
        largest = max(sizes, key=lambda axis: sizes[axis])
        sizes[largest] //= 2
    interleaved = p.schedule == "interleaved" and sizes["pp"] > 1
    return Layout(
        tp=sizes["tp"],
        cp=sizes["cp"],
        dp=sizes["dp"],
        pp=sizes["pp"],
        zero=p.zero if sizes["dp"] * sizes["cp"] > 1 else 0,
        sequence_parallel=p.sequence_parallel,
        cp_kind=p.cp_kind,
        recompute=p.recompute,
        schedule="interleaved" if interleaved else "1f1b",
        chunks=2 if interleaved else 1,
    )


def apply_layout(small: RunConfig, layout: Layout) -> RunConfig:
    """The small config at ``layout``."""
    parallel = small.parallel.model_copy(
        update={
            "tp": layout.tp,
            "cp": layout.cp,
            "pp": layout.pp,
            "dp": layout.dp,
            "zero": layout.zero,
            "sequence_parallel": layout.sequence_parallel,
            "cp_kind": layout.cp_kind,
            "recompute": layout.recompute,
            "schedule": layout.schedule,
            "chunks": layout.chunks,
        }
    )
    batch = small.train.batch_size
    micro = min(layout.micro_batch or small.train.micro_batch_size, max(1, batch // layout.dp))
    if layout.schedule == "interleaved" and layout.micro_batch is None and batch // (micro * layout.dp) % layout.pp != 0:
        micro = 1  # the schedule wants the stages to divide the number of micro-batches
    train = small.train.model_copy(update={"micro_batch_size": micro})
    return small.model_copy(update={"parallel": parallel, "train": train})


def refusal(small: RunConfig, layout: Layout) -> str | None:
    """Why the small config cannot run at ``layout``, with the nearest that works; None when it can."""
    config = apply_layout(small, layout)
    if layout.world_size > 2 * MAX_RANKS:
        return f"{layout.world_size} ranks are more than one machine should be asked for here; compare a smaller layout of the same axes"
    sentences = [f"{rule.keys[0]}: {message}" for rule, message in broken_rules(config)]
    sentences += [f"{problem.key}: {problem.message}" for problem in problems_for_ranks(config, layout.world_size)]
    return "; ".join(sentences) or None
