"""Continuations drawn at random, or greedily: several at once, each a function of the seed and its own number.

The random number of a token depends on seed, number of the sample and place in the continuation, and on nothing else: sample 3 is
the same text alone, among four, or after another sample has ended. (In bf16 a matrix product can round differently with
another number of rows, so that a draw on the very edge between two tokens falls the other way.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dist_llm.generate.context import Context
from dist_llm.generate.logits import keep_top_k, keep_top_p, pick, scale_temperature
from dist_llm.generate.vocabulary import Continuation, Vocabulary
from dist_llm.models.decoder import Decoder
from dist_llm.utils.errors import ConfigError

__all__ = ["OnTokens", "Sampling", "sample", "uniform"]

# What a step wrote: number of the sample -> token.
OnTokens = Callable[[dict[int, int]], None]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: temperature first, then the ``top_k`` most probable, then the nucleus ``top_p`` of those.

    ``greedy`` takes the most probable token and looks at nothing else.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature {self.temperature} must be above 0; for the most probable token each time, use --greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top-k {self.top_k} must be at least 1; leave it out to draw from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p {self.top_p} must be above 0 and at most 1; leave it out to draw from all tokens")


def uniform(seed: int, sample_number: int, place: int) -> float:
    """The random number of token ``place`` of sample ``sample_number``: a multiple of 2^-52 in [0, 1)."""
    digest = hashlib.sha256(f"dist_llm sample, seed {seed}, sample {sample_number}, token {place}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 12) * 2.0**-52


@torch.inference_mode()
def sample(
    model: Decoder,
    prompt: Sequence[int],
    vocabulary: Vocabulary,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    num_samples: int = 1,
    seed: int = 0,
    use_cache: bool = True,
    on_step: Callable[[int], None] | None = None,
    on_tokens: OnTokens | None = None,
) -> list[Continuation]:
    """``num_samples`` continuations of ``prompt``, in the order of their numbers.

    Args:
        model: in the dtype it computes in.
        prompt: ids, the begin token first.
        vocabulary: what may be written.
        max_new_tokens: a continuation ends with the end token or at this length.
        sampling: how tokens are chosen.
        num_samples: continuations wanted; the prompt is read once for all.
        seed: of the random numbers.
        use_cache: keep keys and values; without, every token reads its whole window again.
        on_step: told after each step how many tokens the longest continuation has.
        on_tokens: told after each step what was written.

    Raises:
        ConfigError: the prompt is longer than the model reads.
        NumericalError: the model's logits are not finite.
    """
    context = Context(model, prompt, max_new_tokens=max_new_tokens, use_cache=use_cache)
    tokens: list[list[int]] = [[] for _ in range(num_samples)]
    logprobs = [0.0] * num_samples
    finished = [False] * num_samples
    live = list(range(num_samples))  # number of the sample in each row of the context
    for place in range(max_new_tokens):
        log_probs = vocabulary.log_probs(context.next_logits())
        if place == 0:  # so far all rows are the prompt: one was read
            context.select([0] * num_samples)
            log_probs = log_probs.expand(num_samples, -1)
        chosen = _choose(log_probs, sampling, [uniform(seed, number, place) for number in live])
        scores = log_probs.gather(-1, chosen[:, None])[:, 0].tolist()
        written = dict(zip(live, chosen.tolist(), strict=True))
        for number, score in zip(live, scores, strict=True):
            tokens[number].append(written[number])
            logprobs[number] += score
            finished[number] = written[number] == vocabulary.eos_id
        if on_tokens is not None:
            on_tokens(written)
        if on_step is not None:
            on_step(place + 1)
        rows = [row for row, number in enumerate(live) if not finished[number]]
        if not rows:
            break
        context.select(rows)
        context.append(chosen[rows])
        live = [live[row] for row in rows]
    return [Continuation(tuple(tokens[n]), logprobs[n], finished[n]) for n in range(num_samples)]


def _choose(log_probs: torch.Tensor, sampling: Sampling, uniforms: list[float]) -> torch.Tensor:
    if sampling.greedy:
        return log_probs.argmax(-1)
    kept = scale_temperature(log_probs, sampling.temperature)
    if sampling.top_k is not None:
        kept = keep_top_k(kept, sampling.top_k)
    if sampling.top_p is not None:
        kept = keep_top_p(kept, sampling.top_p)
    return pick(kept, torch.tensor(uniforms, dtype=torch.float64, device=kept.device))
