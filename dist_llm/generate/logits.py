"""Which tokens may be drawn: pure functions on logits, each of which leaves at least one.

B batch, V vocabulary. A token that may not be drawn has the logit minus infinity. Logits may be shifted by a constant, so that
log-probabilities will do as well. Equal logits are ordered by token id: the same logits always leave the same tokens.
"""

from __future__ import annotations

import torch

__all__ = ["keep_top_k", "keep_top_p", "pick", "scale_temperature"]


def scale_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits divided by ``temperature``: below 1 the likely becomes likelier, above 1 everything becomes more alike.

    Args:
        logits: (B, V).
        temperature: above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature ({temperature}) must be above 0")
    # The largest becomes 0 first, so that a tiny temperature overflows to minus infinity and never to inf - inf.
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k`` largest logits of each row, the others minus infinity (Fan et al., arXiv:1805.04833).

    Args:
        logits: (B, V).
        k: at least 1; all are kept when k is V or more.
    """
    if k < 1:
        raise ValueError(f"top_k ({k}) must be at least 1")
    if k >= logits.shape[-1]:
        return logits
    dropped = logits.argsort(dim=-1, descending=True, stable=True)[..., k:]
    return logits.scatter(-1, dropped, float("-inf"))


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """The nucleus: the smallest set of most probable tokens whose probability reaches ``p`` (Holtzman et al., arXiv:1904.09751).

    Args:
        logits: (B, V).
        p: in (0, 1]; 1 keeps everything.
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p ({p}) must be above 0 and at most 1")
    if p == 1:
        return logits  # the sum of all may miss 1 by rounding, and the tail would be cut for it
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1, dtype=torch.float64)
    # A token stays when those before it do not reach p yet; nothing is before the first, so one always stays.
    before = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill(before >= p, float("-inf"))
    return torch.empty_like(logits).scatter(-1, order, ordered)


def pick(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token of each row at which the cumulative probability passes a uniform number.

    Args:
        logits: (B, V).
        uniforms: (B,) float64 in [0, 1 - 2^-52]; the same number and nearly the same logits give the same token.

    Returns:
        (B,) int64, never a token of logit minus infinity.
    """
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    # Times the sum as it was rounded: the product stays below it, and the first entry above the product owns some probability.
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
