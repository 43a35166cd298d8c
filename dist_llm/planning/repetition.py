"""When the corpus is too small for the compute: what another pass over the same tokens is worth.

Muennighoff et al. (arXiv:2305.16264, section 3): a repeated token is worth less with every pass, and so is a parameter beyond the
number that the unique tokens can use. With U_D unique tokens, R_D = D / U_D - 1 repetitions and a decay constant R_D*:

    D' = U_D + U_D R_D* (1 - exp(-R_D / R_D*))          N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*))

where U_N is the compute-optimal size for U_D tokens (at most N) and R_N = N / U_N - 1. Up to 4 passes cost next to nothing; of 40,
little is left to gain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_llm.planning.laws import ChinchillaLaw, Optimum, optimal

__all__ = ["MUENNIGHOFF", "DataConstrainedLaw", "effective"]


def effective(amount: float, unique: float, decay: float) -> float:
    """What ``amount`` is worth when only ``unique`` of it is new, with ``decay`` = R*.

    At most ``unique * (1 + decay)``, which endless repetition approaches.
    """
    if amount <= unique:
        return amount
    return unique + unique * decay * -math.expm1(-(amount / unique - 1) / decay)


@dataclass(frozen=True)
class DataConstrainedLaw:
    """A Chinchilla law over effective parameters and tokens, equation 6 of Muennighoff et al."""

    base: ChinchillaLaw
    unique_tokens: float
    token_decay: float = 15.387756  # R_D*, the fit of appendix A
    param_decay: float = 5.309743  # R_N*

    def effective_tokens(self, tokens: float) -> float:
        """D'."""
        return effective(tokens, self.unique_tokens, self.token_decay)

    def effective_params(self, params: float) -> float:
        """N'."""
        return effective(params, self.base.optimal_params(self.unique_tokens), self.param_decay)

    def loss(self, params: float, tokens: float) -> float:
        """Nats per token after ``tokens`` tokens, repetitions counted."""
        return self.base.loss(self.effective_params(params), self.effective_tokens(tokens))

    def optimal(self, flops: float) -> Optimum:
        """The best split of ``flops``: more passes and a smaller model than without the limit."""
        return optimal(self.loss, flops)


# The coefficients of the paper for C4: alpha = beta, so that parameters and tokens grow alike.
MUENNIGHOFF = ChinchillaLaw(E=1.87, A=521.0, B=1488.0, alpha=0.353, beta=0.353)
