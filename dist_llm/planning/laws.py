"""Scaling laws with their published coefficients, and what they advise for a number of FLOPs.

Losses are nats per token of the text a law was fitted on: differences carry over to another corpus, the constant does not.
Training costs 6 FLOPs a parameter and token everywhere here, as in the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["APPROACH_1", "HOFFMANN", "KAPLAN", "REPLICATION", "ChinchillaLaw", "KaplanLaw", "Law", "Optimum", "PowerLaw", "optimal"]

FLOPS_PER_PARAMETER_TOKEN = 6.0


@dataclass(frozen=True)
class Optimum:
    """The model and the tokens that a number of FLOPs is best spent on."""

    flops: float
    params: float
    tokens: float
    loss: float

    @property
    def tokens_per_parameter(self) -> float:
        """The ratio that became 20 in folklore."""
        return self.tokens / self.params


class Law(Protocol):
    """Loss as a function of parameters and tokens."""

    def loss(self, params: float, tokens: float) -> float:
        """Nats per token after ``tokens`` tokens."""
        ...


@dataclass(frozen=True)
class ChinchillaLaw:
    """L = E + A / N^alpha + B / D^beta, equation 2 of Hoffmann et al. (arXiv:2203.15556); N counts all parameters."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params: float, tokens: float) -> float:
        """Nats per token after ``tokens`` tokens."""
        return float(self.E + self.A / params**self.alpha + self.B / tokens**self.beta)

    def optimal(self, flops: float) -> Optimum:
        """Equation 4: N = G (C/6)^a and D = (C/6)^b / G with G = (alpha A / (beta B))^(1/(alpha+beta)), a = beta / (alpha+beta)."""
        total = self.alpha + self.beta
        if not (self.alpha > 0 and self.beta > 0 and self.A > 0 and self.B > 0):
            raise ValueError(f"{self} has no optimum: parameters and tokens must both lower the loss")
        balance = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        work = flops / FLOPS_PER_PARAMETER_TOKEN
        params, tokens = balance * work ** (self.beta / total), work ** (self.alpha / total) / balance
        return Optimum(flops, params, tokens, self.loss(params, tokens))

    def flops_for_params(self, params: float) -> float:
        """Compute at which a model of this size is the best one."""
        return self.optimal_tokens(params) * FLOPS_PER_PARAMETER_TOKEN * params

    def optimal_tokens(self, params: float) -> float:
        """Tokens at which a model of this size is the best one for its compute: alpha A / N^alpha = beta B / D^beta."""
        return float((self.beta * self.B / (self.alpha * self.A) * params**self.alpha) ** (1 / self.beta))

    def optimal_params(self, tokens: float) -> float:
        """The size for which this many tokens are the best choice."""
        return float((self.alpha * self.A / (self.beta * self.B) * tokens**self.beta) ** (1 / self.alpha))


@dataclass(frozen=True)
class KaplanLaw:
    """L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D, equation 1.5 of Kaplan et al. (arXiv:2001.08361).

    Its N leaves the embeddings out, and D is the size of the data set of a model trained until it would overfit; it is shown beside
    Chinchilla's law because much was planned with it.
    """

    alpha_N: float
    alpha_D: float
    N_c: float
    D_c: float

    def loss(self, params: float, tokens: float) -> float:
        """Nats per token; ``params`` without embeddings."""
        return float(((self.N_c / params) ** (self.alpha_N / self.alpha_D) + self.D_c / tokens) ** self.alpha_D)

    def optimal(self, flops: float) -> Optimum:
        """The best split of 6 N D, in closed form: (N_c/N)^s and D_c/D in the proportion 1 to s, with s = alpha_N/alpha_D.

        The paper's own advice, N growing as C^0.73, comes from its law of training steps and not from this one.
        """
        s = self.alpha_N / self.alpha_D
        if not (self.alpha_N > 0 and self.alpha_D > 0):
            raise ValueError(f"{self} has no optimum: parameters and tokens must both lower the loss")
        work = flops / FLOPS_PER_PARAMETER_TOKEN
        # d/dlogN of (N_c/N)^s + D_c N / work is zero: s (N_c/N)^s = D_c N / work. In logarithms, N_c^s may be beyond any float.
        log_n = (math.log(s) + s * math.log(self.N_c) + math.log(work) - math.log(self.D_c)) / (1 + s)
        params = math.exp(log_n)
        return Optimum(flops, params, work / params, self.loss(params, work / params))


@dataclass(frozen=True)
class PowerLaw:
    """The best size for C FLOPs, params = coefficient * C^exponent: what the first two approaches of Hoffmann et al. fit."""

    coefficient: float
    exponent: float

    def params(self, flops: float) -> float:
        """Best number of parameters."""
        return float(self.coefficient * flops**self.exponent)

    def tokens(self, flops: float) -> float:
        """Tokens that are then paid for."""
        return flops / (FLOPS_PER_PARAMETER_TOKEN * self.params(flops))

    def flops(self, params: float) -> float:
        """Compute for which this size is best."""
        return float((params / self.coefficient) ** (1 / self.exponent))


# Approach 1 as the rows of table 3 print it (1 billion at 1.21e20 FLOPs, 1 trillion at 1.27e26).
APPROACH_1 = PowerLaw(coefficient=1e9 / 1.21e20**0.49826, exponent=0.49826)

# Appendix D.2, figure A5; and Besiroglu et al. (arXiv:2404.10102), refitted to the points of the paper's figure 4.
HOFFMANN = ChinchillaLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
REPLICATION = ChinchillaLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
# Table 2 of Kaplan et al.: the joint fit of N and D.
KAPLAN = KaplanLaw(alpha_N=0.076, alpha_D=0.103, N_c=6.4e13, D_c=1.8e13)


def optimal(loss: Callable[[float, float], float], flops: float, *, low: float = 1e3, high: float = 1e16) -> Optimum:
    """The best split of ``flops`` for any loss with one valley along 6 N D = flops, by golden section over log N.

    Args:
        loss: of parameters and tokens.
        flops: to spend.
        low: smallest number of parameters looked at.
        high: largest.
    """
    golden = (math.sqrt(5) - 1) / 2
    work = flops / FLOPS_PER_PARAMETER_TOKEN

    def at(log_n: float) -> float:
        return loss(math.exp(log_n), work / math.exp(log_n))

    a, b = math.log(low), math.log(high)
    c, d = b - golden * (b - a), a + golden * (b - a)
    at_c, at_d = at(c), at(d)
    while b - a > 1e-9:
        if at_c <= at_d:
            b, d, at_d = d, c, at_c
            c = b - golden * (b - a)
            at_c = at(c)
        else:
            a, c, at_c = c, d, at_d
            d = a + golden * (b - a)
            at_d = at(d)
    params = math.exp((a + b) / 2)
    return Optimum(flops, params, work / params, loss(params, work / params))
