"""The model and the number of tokens that a time budget buys, at the Chinchilla ratio.

Hoffmann et al. (arXiv:2203.15556) find that parameters and tokens should grow together; their three approaches put the
compute-optimal ratio near 20 tokens a parameter for models from 70M to 16B. Below that it is an extrapolation, and where a
small embedding is most of the model the paper's own choice of what counts as a parameter matters: here all parameters count,
embedding included, as in the paper's Table A9.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dist_llm.config.schema import ModelConfig
from dist_llm.planning.count import count_params, flops_per_token
from dist_llm.utils.errors import ConfigError

__all__ = ["TOKENS_PER_PARAMETER", "Choice", "SpeedPoint", "choose_size", "ladder", "seconds_per_token"]

TOKENS_PER_PARAMETER = 20

# (width, layers), smallest first. Depth grows with width, as it does in the model families of the papers. At equal parameters and
# tokens 4 layers of 64 reached a lower loss than 2 of 96 here (docs/log.md), so the narrow end is deep for its width.
_SHAPES = (
    (32, 1), (32, 2), (48, 2), (48, 3), (64, 2), (64, 3), (64, 4), (64, 5), (80, 4), (80, 5), (96, 4), (96, 5), (112, 5), (128, 5),
    (128, 6), (160, 6), (192, 6), (224, 6), (256, 6), (256, 8), (320, 8), (384, 8), (448, 8), (512, 8), (512, 12), (640, 12),
    (768, 12), (1024, 12), (1024, 16), (1024, 24), (1536, 24), (2048, 24),
)  # fmt: skip
_MEASURED_PARAMS = (70e6, 16e9)  # the models the ratio was found on


@dataclass(frozen=True)
class SpeedPoint:
    """A measured training speed: all ranks together, whole steps."""

    d_model: int
    num_layers: int
    flops_per_token: float
    tokens_per_s: float


@dataclass(frozen=True)
class Choice:
    """What to train, and why."""

    model: ModelConfig
    params: int
    tokens: int
    steps: int
    expected_s: float
    reason: str


def ladder(vocab_size: int, seq_len: int) -> list[ModelConfig]:
    """LLaMA-like shapes from a thousand to a billion parameters, smallest first."""
    return sorted(
        (
            ModelConfig(
                vocab_size=vocab_size,
                d_model=width,
                num_layers=layers,
                num_heads=_heads(width),
                max_seq_len=seq_len,
            )
            for width, layers in _SHAPES
        ),
        key=lambda m: count_params(m).total,
    )


def _heads(width: int) -> int:
    # Heads near 16 wide in the narrowest models (4 heads of 16 beat 2 of 32 at width 64, docs/log.md), 32 and 64 in larger ones;
    # rotary positions need an even size.
    target = 16 if width <= 96 else 32 if width < 512 else 64
    fitting = [n for n in range(1, width + 1) if width % n == 0 and width // n % 2 == 0]
    return min(fitting, key=lambda n: abs(width // n - target))


def seconds_per_token(points: Sequence[SpeedPoint], flops: float) -> float:
    """Time of a token of a model with ``flops`` training FLOPs a token, between or beyond measured models.

    Small models are bound by the number of ops, large ones by arithmetic, so time against FLOPs is a curve; in logarithms it is
    nearly straight between neighbours. Beyond the largest measured model time grows with FLOPs, below the smallest it stays.
    """
    if not points:
        raise ValueError("no measured speeds")
    ordered = sorted(points, key=lambda p: p.flops_per_token)
    if flops <= ordered[0].flops_per_token:
        return 1 / ordered[0].tokens_per_s
    if flops >= ordered[-1].flops_per_token:
        return flops / ordered[-1].flops_per_token / ordered[-1].tokens_per_s
    for left, right in itertools.pairwise(ordered):
        if flops <= right.flops_per_token:
            share = math.log(flops / left.flops_per_token) / math.log(right.flops_per_token / left.flops_per_token)
            return math.exp((1 - share) * -math.log(left.tokens_per_s) + share * -math.log(right.tokens_per_s))
    raise AssertionError("unreachable: flops lies between the first and the last point")


def choose_size(points: Sequence[SpeedPoint], *, budget_s: float, vocab_size: int, seq_len: int, batch_size: int) -> Choice:
    """The largest model of the ladder whose 20 tokens a parameter fit the budget.

    Args:
        points: measured speeds on this machine, with the ranks and the batch the run will have.
        budget_s: seconds of training.
        vocab_size: of the tokenizer.
        seq_len: tokens in a row.
        batch_size: rows in a step.

    Raises:
        ConfigError: even the smallest model does not fit; the message says what would.
    """
    step_tokens = batch_size * seq_len
    best: Choice | None = None
    smallest_s = math.inf
    for model in ladder(vocab_size, seq_len):
        params = count_params(model).total
        steps = max(1, round(TOKENS_PER_PARAMETER * params / step_tokens))
        tokens = steps * step_tokens
        expected = tokens * seconds_per_token(points, flops_per_token(model, seq_len))
        smallest_s = min(smallest_s, expected)
        if expected > budget_s:
            continue
        best = Choice(
            model=model,
            params=params,
            tokens=tokens,
            steps=steps,
            expected_s=expected,
            reason=(
                f"{params:,} parameters (all of them, embedding included) x {TOKENS_PER_PARAMETER} = {TOKENS_PER_PARAMETER * params:,} "
                f"tokens, {steps:,} steps of {step_tokens:,}; expected {expected:.0f} s of the {budget_s:.0f} s budget at the speed "
                f"measured here. It is the largest of {len(_SHAPES)} shapes that fits. {TOKENS_PER_PARAMETER} tokens a parameter is the "
                f"compute-optimal ratio of Hoffmann et al. (2022) for 70M to 16B parameters; {_standing(params)}"
            ),
        )
    if best is None:
        raise ConfigError(
            f"no model of the ladder trains in {budget_s:g} s here; the smallest needs {math.ceil(smallest_s)} s: give more time"
        )
    return best


def _standing(params: int) -> str:
    smallest, largest = _MEASURED_PARAMS
    return "this size lies between them" if smallest <= params <= largest else "at this size it is an extrapolation"
