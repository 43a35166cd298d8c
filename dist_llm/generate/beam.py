"""Beam search: the most probable continuations that a bounded search finds.

At each step every live hypothesis is grown by every token, and the best ``beams`` of all go on. One that ends leaves the beam for
a list of its own, and a place becomes free. The order of results is by log P / lp, with the length penalty of Wu et al.
(arXiv:1609.08144, equation 14) lp(Y) = ((5 + |Y|) / 6)^alpha, |Y| the tokens of the continuation with its end token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dist_llm.generate.context import Context
from dist_llm.generate.vocabulary import Continuation, Vocabulary
from dist_llm.models.decoder import Decoder

__all__ = ["beam_search", "length_penalty", "normalised_score"]


def length_penalty(length: int, alpha: float) -> float:
    """lp: what the log-probability of ``length`` tokens is divided by; 1 for every length when ``alpha`` is 0."""
    return float(((5 + length) / 6) ** alpha)


def normalised_score(continuation: Continuation, alpha: float) -> float:
    """By what results are ordered: larger is better."""
    return continuation.logprob / length_penalty(len(continuation.tokens), alpha)


@torch.inference_mode()
def beam_search(
    model: Decoder,
    prompt: Sequence[int],
    vocabulary: Vocabulary,
    *,
    beams: int,
    max_new_tokens: int,
    alpha: float = 0.0,
    num_results: int = 1,
    use_cache: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> list[Continuation]:
    """The best ``num_results`` continuations found, best first; fewer only when fewer exist.

    The search stops when nothing live can come before the worst of these any more. With one beam it takes the most probable
    token each time and stops at the first end token: greedy decoding.

    Args:
        model: in the dtype it computes in.
        prompt: ids, the begin token first.
        vocabulary: what may be written.
        beams: hypotheses that live side by side.
        max_new_tokens: a continuation ends with the end token or at this length.
        alpha: exponent of the length penalty; 0 orders by probability, more favours longer texts.
        num_results: at most ``beams``.
        use_cache: keep keys and values, and move them with the hypotheses.
        on_step: told after each step how many tokens the live hypotheses have.

    Raises:
        ConfigError: the prompt is longer than the model reads.
        NumericalError: the model's logits are not finite.
    """
    if not 1 <= num_results <= beams:
        raise ValueError(f"num_results ({num_results}) must be at least 1 and at most beams ({beams})")

    def best(hypotheses: list[Continuation]) -> list[Continuation]:
        return sorted(hypotheses, key=lambda h: -normalised_score(h, alpha))[:num_results]

    context = Context(model, prompt, max_new_tokens=max_new_tokens, use_cache=use_cache)
    live = [Continuation((), 0.0, finished=False)]  # one a row of the context, the most probable first
    finished: list[Continuation] = []
    for length in range(1, max_new_tokens + 1):
        ended, live, rows = _grow(live, vocabulary.log_probs(context.next_logits()), vocabulary.eos_id, beams)
        finished = best(finished + ended)
        if on_step is not None:
            on_step(length)
        if not live or length == max_new_tokens:
            break
        # With one beam there is nothing to compare an ended text with: the first one is the answer, whatever alpha promises.
        if len(finished) == num_results and (
            beams == 1 or normalised_score(finished[-1], alpha) >= _reachable(live[0].logprob, length, max_new_tokens, alpha)
        ):
            live = []
            break
        context.select(rows)
        context.append(torch.tensor([h.tokens[-1] for h in live], dtype=torch.int64, device=context.tokens_BT.device))
    return best(finished + live)


def _grow(
    live: list[Continuation], log_probs: torch.Tensor, eos_id: int, beams: int
) -> tuple[list[Continuation], list[Continuation], list[int]]:
    """One step: hypotheses that end, those that live on, and the row each of the latter comes from.

    Args:
        live: one a row.
        log_probs: (rows, V) float64.
        eos_id: ends a hypothesis.
        beams: at most so many live on.
    """
    totals = (log_probs + log_probs.new_tensor([h.logprob for h in live])[:, None]).flatten()
    # Twice as many as can live on: at most one in each row ends. Stable, so that ties fall to the better row and the lower id.
    values, order = totals.sort(descending=True, stable=True)
    ended: list[Continuation] = []
    grown: list[Continuation] = []
    rows: list[int] = []
    candidates = zip(values[: 2 * beams].tolist(), order[: 2 * beams].tolist(), strict=True)
    for rank, (logprob, flat) in enumerate(candidates):
        if logprob == float("-inf") or len(grown) == beams:
            break
        row, token = divmod(flat, log_probs.shape[1])
        tokens = (*live[row].tokens, token)
        if token != eos_id:
            grown.append(Continuation(tokens, logprob, finished=False))
            rows.append(row)
        elif rank < beams:  # an end outside the beam is no better than a token outside it
            ended.append(Continuation(tokens, logprob, finished=True))
    return ended, grown, rows


def _reachable(logprob: float, length: int, max_length: int, alpha: float) -> float:
    """The best score that a hypothesis of ``length`` tokens can still get.

    Its log-probability, at most 0, can only fall; the penalty is monotone in the length, so one of the two ends is the best.
    """
    return logprob / max(length_penalty(length + 1, alpha), length_penalty(max_length, alpha))
