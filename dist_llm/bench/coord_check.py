"""``bench coord-check``: how large activations are, and how far a few steps move them, as a model grows wider.

Yang et al. (arXiv:2203.03466, section D.1) call it the coordinate check: under muP the mean absolute coordinate of every
activation, and of its change since initialisation, does not depend on width; under the standard parametrisation, with one learning
rate and one deviation of initial weights for all widths, it grows. Whatever of muP is missing or wrong shows here as a slope.

Each width is trained in fp32 on one batch of random tokens, the same batch again and again: the change of an activation is then
that of one function of the weights, and gradients of successive steps point the same way, which is where a wrong rate shows first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from dist_llm.comm.context import ParallelContext
from dist_llm.config.rules import broken_rules
from dist_llm.config.schema import ModelConfig, ParallelConfig, RunConfig
from dist_llm.engine.base import DeviceBatch
from dist_llm.engine.build import build_engine, choose_ops
from dist_llm.engine.launch import close_context, open_context
from dist_llm.engine.ranks import read_launch
from dist_llm.layers.attention import SelfAttention
from dist_llm.models.block import Block
from dist_llm.models.decoder import Decoder
from dist_llm.utils.errors import ConfigError, NumericalError

__all__ = ["FLAT", "PARAMETRISATIONS", "check_coordinates", "coordinates_as_text", "default_widths", "model_at"]

ROWS, LENGTH, VOCAB = 8, 64, 512  # at most; slopes need no more
# Largest slope that counts as flat. Noise of three seeds and the corrections of a finite width stay below 0.15 on the tiny configs; a
# missing factor of muP gives 0.5 (initial weights) or 1 (rate, logits).
FLAT = 0.3
PARAMETRISATIONS = ("standard", "mup")
_Coordinates = dict[str, torch.Tensor]


def model_at(model: ModelConfig, width: int, *, base_width: int | None) -> ModelConfig:
    """``model`` at another width, in proportion: larger heads, or more of them where ``head_dim`` is given.

    Args:
        model: the model whose proportions are kept.
        width: d_model.
        base_width: of muP; None: the standard parametrisation.

    Raises:
        ConfigError: heads of a given size do not add up to that width.
    """
    heads, kv_heads = model.num_heads, model.num_kv_heads
    if model.head_dim is not None:
        heads = _scaled(model.num_heads, width, model, "num_heads")
        # One key-value head for all stays one; fewer than the query heads grow with them.
        kv_heads = kv_heads if kv_heads in (None, 1) else _scaled(kv_heads, width, model, "num_kv_heads")
    return model.model_copy(
        update={
            "vocab_size": min(model.vocab_size, VOCAB),
            "d_model": width,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "ffn_dim": max(1, round(model.ffn_size * width / model.d_model)),
            "max_seq_len": max(model.max_seq_len, LENGTH) if model.position == "rotary" else model.max_seq_len,
            "dropout": 0.0,  # noise that no slope is about
            "mup_base_width": base_width,
            "mup_base_head_dim": model.mup_base_head_dim if base_width is not None else None,
        }
    )


def default_widths(model: ModelConfig) -> list[int]:
    """Four widths, each twice the one before, from the smallest of at least 32 at which the heads of ``model`` come out whole."""
    if model.head_dim is None:
        step = model.num_heads * (2 if model.position == "rotary" else 1)
    else:
        step = model.d_model // math.gcd(model.num_heads, model.kv_heads, model.d_model)
    return [-(-32 // step) * step * factor for factor in (1, 2, 4, 8)]


def _scaled(count: int, width: int, model: ModelConfig, key: str) -> int:
    scaled, rest = divmod(count * width, model.d_model)
    if rest or scaled < 1:
        step = model.d_model // math.gcd(count, model.d_model)
        raise ConfigError(
            f"--widths {width}: model.{key} {count} at d_model {model.d_model} becomes {count * width / model.d_model:g}, since model.head_dim "
            f"is given; use multiples of {step}, or model.head_dim=null for heads that grow"
        )
    return scaled


def check_coordinates(
    config: RunConfig, *, widths: Sequence[int], steps: int, seeds: int = 3, threads: int | None = None
) -> dict[str, Any]:
    """Train each width with and without muP and measure.

    Args:
        config: shape, learning rate and deviation of initial weights; its ``mup_base_width``, else the smallest width, is the base.
        widths: at least two, rising.
        steps: of the optimiser, at the constant rate ``optim.lr``.
        seeds: initialisations to average over.
        threads: CPU threads; default all cores.

    Returns:
        ``{"widths", "base_width", "steps", "lr", "parts", "ok", "worst", "mup": {...}, "standard": {...}}``, where each of the two has
        ``size`` and ``change`` (part: one number a width, mean absolute value after the last step) and their ``slopes``.

    Raises:
        ConfigError: a width cannot be built.
        NumericalError: a model diverged.
    """
    base = config.model.mup_base_width or widths[0]
    runs = {(name, w): _small_run(config, w, base if name == "mup" else None) for name in PARAMETRISATIONS for w in widths}
    ctx = open_context(read_launch({}), needs_process_group=False, threads=threads)
    try:
        measured = {key: _mean_of([_train(_with_seed(run, s), ctx, steps) for s in range(seeds)], *key) for key, run in runs.items()}
    finally:
        close_context()
    parts = list(measured["mup", widths[0]])
    answer: dict[str, Any] = {
        "widths": list(widths),
        "base_width": base,
        "steps": steps,
        "seeds": seeds,
        "lr": config.optim.lr,
        "parts": parts,
    }
    for name in PARAMETRISATIONS:
        curves = {what: {part: [measured[name, w][part][what] for w in widths] for part in parts} for what in ("size", "change")}
        slopes = {what: {part: _slope(widths, values) for part, values in curve.items()} for what, curve in curves.items()}
        answer[name] = {**curves, "slopes": slopes}
    return {**answer, **_verdict(answer["mup"]["slopes"])}


def _small_run(config: RunConfig, width: int, base_width: int | None) -> RunConfig:
    model = model_at(config.model, width, base_width=base_width)
    rows = min(config.train.batch_size, ROWS)
    run = config.model_copy(
        update={
            "precision": "fp32",  # bf16 would round a small change away
            "model": model,
            "data": config.data.model_copy(update={"path": None, "seq_len": min(config.data.seq_len, LENGTH), "document_mask": False}),
            "train": config.train.model_copy(update={"batch_size": rows, "micro_batch_size": rows, "engine": "plain"}),
            "parallel": ParallelConfig(),
        }
    )
    if broken := broken_rules(run):
        raise ConfigError(f"--widths {width}: " + "; ".join(f"{rule.keys[0]}: {message}" for rule, message in broken))
    return run


def _with_seed(run: RunConfig, number: int) -> RunConfig:
    return run.model_copy(update={"seed": run.seed + number})


def _train(run: RunConfig, ctx: ParallelContext, steps: int) -> dict[str, dict[str, float]]:
    """Size and change of every part after ``steps`` steps on one batch."""
    engine = build_engine(run, ctx, choose_ops(run, ctx), None)
    model = engine.loss_module.model
    generator = torch.Generator().manual_seed(run.seed)
    shape = (run.train.batch_size, run.data.seq_len + 1)
    # Frequencies of words fall as their rank (Zipf): that some tokens are common is what every model learns first, so that logits
    # move for a reason; with even frequencies their change at small widths is mostly that of a random matrix.
    frequencies = 1 / torch.arange(1, run.model.vocab_size + 1, dtype=torch.float64)
    stream = torch.multinomial(frequencies, shape[0] * shape[1], replacement=True, generator=generator).view(shape).to(ctx.device)
    positions = torch.arange(run.data.seq_len, device=ctx.device).expand(shape[0], -1)
    batch = DeviceBatch(tokens=stream[:, :-1], targets=stream[:, 1:], positions=positions, doc_ids=None)
    before = _coordinates(model, batch)
    for _ in range(steps):
        engine.train_step([batch], num_tokens=batch.targets.numel(), lr=run.optim.lr)
    after = _coordinates(model, batch)
    engine.close()
    return {
        part: {"size": float(value.abs().mean()), "change": float((value - before[part]).abs().mean())} for part, value in after.items()
    }


@torch.no_grad()
def _coordinates(model: Decoder, batch: DeviceBatch) -> _Coordinates:
    """Activations of ``batch``, by part: the embedding, scores and outputs of some blocks, the final hidden states, the logits."""
    named: dict[str, nn.Module] = {"embedding": model.embedding}
    # The first, a middle and the last block: what a width does to one it does to its neighbours.
    numbers = dict.fromkeys(list(model.blocks)[i] for i in (0, len(model.blocks) // 2, -1))
    blocks = {number: cast(Block, model.blocks[number]) for number in numbers}
    for number, block in blocks.items():
        named |= {f"query {number}": block.attention.query, f"key {number}": block.attention.key}
        named |= {f"attention {number}": block.attention, f"mlp {number}": block.mlp}
    named["final hidden"] = model.final_norm
    seen: _Coordinates = {}
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, out, part=part: seen.__setitem__(part, out.clone()))
        for part, module in named.items()
    ]
    try:
        seen["logits"] = F.linear(model(batch.tokens, batch.positions), model.head_weight)
    finally:
        for hook in hooks:
            hook.remove()
    parts = {"embedding": seen["embedding"]}
    for number, block in blocks.items():
        parts[f"scores {number}"] = _own_scores(block.attention, seen[f"query {number}"], seen[f"key {number}"])
        parts |= {part: seen[part] for part in (f"attention {number}", f"mlp {number}")}
    return {**parts, "final hidden": seen["final hidden"], "logits": seen["logits"]}


def _own_scores(attention: SelfAttention, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(B, T, N) score of each token with itself, as large as others and the same with and without rotary positions, which cancel."""
    rows, tokens, _ = query.shape
    q_BTNH, k_BTKH = (x.view(rows, tokens, -1, attention.head_dim) for x in (query, key))
    k_BTNH = k_BTKH.repeat_interleave(q_BTNH.shape[2] // k_BTKH.shape[2], dim=2)
    return (q_BTNH * k_BTNH).sum(-1) * attention.scale


def _mean_of(runs: list[dict[str, dict[str, float]]], name: str, width: int) -> dict[str, dict[str, float]]:
    mean = {part: {what: fmean(run[part][what] for run in runs) for what in values} for part, values in runs[0].items()}
    for part, values in mean.items():
        if not all(math.isfinite(value) for value in values.values()):
            raise NumericalError(f"{part} is not finite at width {width} ({name} parametrisation); lower optim.lr or take fewer steps")
    return mean


def _slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Least squares of log value on log width: value grows as width ** slope. Zero where a value is zero."""
    if min(values) <= 0:
        return 0.0
    x, y = [math.log(w) for w in widths], [math.log(v) for v in values]
    centre = fmean(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x)


def _verdict(slopes: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Under muP nothing grows, and what the steps change does not fall either.

    Logits and scores may fall: of random matrices they do, by the root of the width, in muP as published, and a few steps leave some
    of that. So may sizes, of which the initial part is one.
    """
    distances = {("size", part): slope for part, slope in slopes["size"].items()}
    for part, slope in slopes["change"].items():
        distances["change", part] = slope if part == "logits" or part.startswith("scores") else abs(slope)
    what, part = max(distances, key=lambda key: distances[key])
    return {"ok": distances[what, part] <= FLAT, "limit": FLAT, "worst": {"what": what, "part": part, "slope": slopes[what][part]}}


def coordinates_as_text(answer: dict[str, Any]) -> str:
    """The answer of ``check_coordinates`` for a person."""
    widths = answer["widths"]
    lines = [
        f"widths {', '.join(map(str, widths))} (base {answer['base_width']}), {answer['steps']} steps at lr {answer['lr']:g}, mean of "
        f"{answer['seeds']} seeds: mean |x| at the narrowest and the widest, and its slope in log x over log width",
        f"{'':16}{'standard':>32}{'muP':>32}",
    ]
    for what, title in (("size", "size after the last step"), ("change", "change since initialisation")):
        lines.append(title)
        for part in answer["parts"]:
            cells = ""
            for name in PARAMETRISATIONS:
                values, slope = answer[name][what][part], answer[name]["slopes"][what][part]
                cells += f"{values[0]:12.2e} ->{values[-1]:9.2e}{slope:+8.2f}"
            lines.append(f"  {part:<14}{cells}")
    worst = answer["worst"]
    relation = "within" if answer["ok"] else "beyond"
    lines.append(f"muP: steepest {worst['what']} {worst['slope']:+.2f} ({worst['part']}), {relation} {answer['limit']:g}")
    return "\n".join(lines)
