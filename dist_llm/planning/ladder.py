"""A ladder of small runs to fit a scaling law to: which sizes, which tokens, at what cost.

The design is IsoFLOP in rows and a curve in columns: every size is trained with a quarter, a half and the whole of one run's FLOPs,
each run with a schedule of its own length (section 3.1 of Hoffmann et al., arXiv:2203.15556: a curve cut short before its learning
rate has come down says nothing about the best run of that length). Sizes are spread evenly in log N around the one that 20 tokens a
parameter make best for the middle budget, so that each budget has models that are too small and models that are too large.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from dist_llm.config.schema import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from dist_llm.planning.budget import TOKENS_PER_PARAMETER, SpeedPoint, ladder, seconds_per_token
from dist_llm.planning.count import count_params, flops_per_token
from dist_llm.planning.count_shapes import training_flops
from dist_llm.utils.errors import ConfigError

__all__ = ["SHARES", "Rung", "design", "run_config", "seconds_of", "within_flops", "within_seconds"]

SHARES = (0.25, 0.5, 1.0)  # of the longest run's FLOPs
_FEWEST_STEPS = 50


@dataclass(frozen=True)
class Rung:
    """One run of the ladder."""

    model: ModelConfig
    params: int
    steps: int
    tokens: int

    @property
    def name(self) -> str:
        """Sorts by size, then length."""
        return f"n{self.params:09d}-s{self.steps:07d}"

    @property
    def flops(self) -> float:
        """6 N D."""
        return training_flops(self.params, self.tokens)


def design(run_flops: float, *, sizes: int, spread: float, vocab_size: int, seq_len: int, batch_size: int) -> list[Rung]:
    """The runs whose longest cost ``run_flops`` each.

    Args:
        run_flops: 6 N D of the most expensive run of each size.
        sizes: how many models.
        spread: largest over smallest number of parameters.
        vocab_size: of the tokenizer.
        seq_len: tokens in a row.
        batch_size: rows in a step.

    Raises:
        ConfigError: no such models exist in the list of shapes, or their runs would be too short to mean anything.
    """
    step_tokens = batch_size * seq_len
    middle = math.sqrt(SHARES[1] * run_flops / (6 * TOKENS_PER_PARAMETER))
    shapes = _shapes(vocab_size, seq_len)
    # A vocabulary is most of a small model: below the smallest shape the sizes begin there instead.
    low = max(middle / math.sqrt(spread), shapes[0][0])
    targets = [low * spread ** (i / (sizes - 1)) for i in range(sizes)]
    chosen = sorted({min(shapes, key=lambda s: abs(math.log(s[0] / t)))[0] for t in targets})
    if len(chosen) < sizes or chosen[-1] < 0.75 * spread * chosen[0]:
        raise ConfigError(
            f"{sizes} sizes over a factor {spread:g} around {middle:,.0f} parameters cannot be told apart among {len(shapes)} shapes of "
            f"{shapes[0][0]:,} to {shapes[-1][0]:,} parameters (vocabulary {vocab_size}); ask for fewer --points or another --budget"
        )
    model_of = dict(shapes)
    rungs = []
    for params, share in itertools.product(chosen, SHARES):
        steps = max(1, round(share * run_flops / (6 * params * step_tokens)))
        rungs.append(Rung(model_of[params], params, steps, steps * step_tokens))
    if (shortest := min(rungs, key=lambda r: r.steps)).steps < _FEWEST_STEPS:
        raise ConfigError(
            f"the shortest run would have {shortest.steps} steps of {step_tokens:,} tokens ({shortest.params:,} parameters), fewer than "
            f"{_FEWEST_STEPS}; give a larger --budget, a smaller --batch-size or a smaller --spread"
        )
    return rungs


@cache
def _shapes(vocab_size: int, seq_len: int) -> tuple[tuple[int, ModelConfig], ...]:
    return tuple((count_params(m).total, m) for m in ladder(vocab_size, seq_len))


def within_flops(total: float, make: Callable[[float], list[Rung]], sizes: int) -> list[Rung]:
    """The design whose runs cost ``total`` FLOPs together, up to the rounding of steps."""
    return make(total / (sizes * sum(SHARES)))


def within_seconds(total: float, make: Callable[[float], list[Rung]], points: Sequence[SpeedPoint]) -> list[Rung]:
    """The largest design that takes at most ``total`` seconds at measured speeds, to about 3 % of the FLOPs.

    Raises:
        ConfigError: no design fits.
    """
    best: list[Rung] = []
    shortest = math.inf
    for exponent in range(9 * 80, 24 * 80):
        try:
            rungs = make(10 ** (exponent / 80))
        except ConfigError:  # too little for runs of 50 steps, or more than the shapes there are
            continue
        seconds = sum(seconds_of(r, points) for r in rungs)
        shortest = min(shortest, seconds)
        if seconds <= total:
            best = rungs
    if not best:
        least = f"; the shortest ladder takes {shortest:.0f} s" if shortest < math.inf else ""
        raise ConfigError(f"no ladder fits {total:g} s at the speed measured{least}: give more time, fewer --points or a smaller --spread")
    return best


def seconds_of(rung: Rung, points: Sequence[SpeedPoint]) -> float:
    """Expected training time of a run at measured speeds."""
    return rung.tokens * seconds_per_token(points, flops_per_token(rung.model, rung.model.max_seq_len))


def run_config(rung: Rung, *, name: str, run_dir: str, data: str | None, batch_size: int, ranks: int, lr: float, seed: int) -> RunConfig:
    """The config of a run: cosine over its own length, evaluated at the end, one checkpoint.

    Args:
        rung: what to train.
        name: of the run.
        run_dir: where it writes.
        data: prepared corpus, or none for now.
        batch_size: rows in a step.
        ranks: that it will be started on; the micro-batch is sized for them.
        lr: peak rate up to a width of 128; beyond it falls as 1 / width (docs/log.md, and table 8 of arXiv:2203.03466).
        seed: of weights and data order.
    """
    width, rows = rung.model.d_model, rung.model.max_seq_len
    return RunConfig(
        name=name,
        run_dir=run_dir,
        seed=seed,
        precision="bf16",
        model=rung.model.model_copy(update={"init_std": round(0.6 / math.sqrt(width), 4)}),
        data=DataConfig(path=data, seq_len=rows),
        train=TrainConfig(steps=rung.steps, batch_size=batch_size, micro_batch_size=batch_size // ranks, engine="auto"),
        optim=OptimConfig(
            lr=float(f"{lr * min(1.0, 128 / width):.4g}"),
            schedule="cosine",
            warmup_steps=max(1, min(50, rung.steps // 10)),
            min_lr_ratio=0.05,
            beta2=0.95,
        ),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=0, keep=1),
        log=LogConfig(every=100),
    )
