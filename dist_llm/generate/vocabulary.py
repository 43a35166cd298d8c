"""Which ids a model may write, and what it has written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_llm.data.tokenizer import Tokenizer

__all__ = ["Continuation", "Vocabulary", "vocabulary_of"]


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt.

    Attributes:
        tokens: ids without the prompt's; the end token is the last of them when ``finished``.
        logprob: sum of their log-probabilities in nats under the model itself, whatever they were chosen by.
        finished: the model wrote the end token; False when it was cut at the number of tokens asked for.
    """

    tokens: tuple[int, ...]
    logprob: float
    finished: bool


@dataclass(frozen=True)
class Vocabulary:
    """The ids that can be written.

    ``allowed``: (V,) bool, V the rows of the model's head; ``eos_id`` ends a text.
    """

    allowed: torch.Tensor
    eos_id: int

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities over the allowed ids, minus infinity elsewhere: (B, V) -> (B, V) float64.

        In float64, so that adding them up along a beam makes no ties that the model did not.
        """
        return logits.masked_fill(~self.allowed, float("-inf")).log_softmax(-1, dtype=torch.float64)


def vocabulary_of(tokenizer: Tokenizer, num_rows: int, device: torch.device) -> Vocabulary:
    """The ids a model with ``num_rows`` rows of head may write with ``tokenizer``: its pieces and the end token.

    Begin, padding and unknown stand for no text, and rows beyond the tokenizer's vocabulary were never trained.
    """
    assert tokenizer.vocab_size <= num_rows, f"{tokenizer.vocab_size} pieces do not fit {num_rows} rows"
    allowed = torch.arange(num_rows, device=device) < tokenizer.vocab_size
    for special in (tokenizer.pad_id, tokenizer.bos_id, tokenizer.unk_id):
        allowed[special] = False
    allowed[tokenizer.eos_id] = True  # last: a tokenizer without a padding token pads with its end token
    return Vocabulary(allowed, tokenizer.eos_id)
