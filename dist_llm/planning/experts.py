"""How many parameters of a dense model a mixture of experts is worth.

Two answers. Fitted to one's own runs, ``plan fit --law moe`` finds the share w of N_active^(1-w) N_total^w, ``effective_params`` here.
From the literature, Clark et al. (arXiv:2202.01169, section 5) give the effective parameter count of a routed model by their law

    log10 L = a log10 N + b log10 E' + c log10 N log10 E' + d,        1/E' = 1/(E - 1 + (1/E_start - 1/E_max)^-1) + 1/E_max

for N parameters met by a token and E experts with one active; the dense model of the same loss has E' = E_start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["ROUTING_LAWS", "RoutingLaw", "effective_params"]


def effective_params(active: float, total: float, share: float) -> float:
    """N_active^(1-share) N_total^share: share 0 counts what a token meets, 1 everything, 0.5 is the geometric mean."""
    return float(active * (total / active) ** share)


@dataclass(frozen=True)
class RoutingLaw:
    """Coefficients of one routing method."""

    a: float
    b: float
    c: float
    d: float
    e_start: float
    e_max: float

    def saturated(self, experts: int) -> float:
        """E': the experts that help, of ``experts``; E_start for one, E_max for endlessly many."""
        if experts < 1:
            raise ValueError(f"experts must be at least 1, got {experts}")
        return 1 / (1 / (experts - 1 + 1 / (1 / self.e_start - 1 / self.e_max)) + 1 / self.e_max)

    def log10_loss(self, params: float, experts: int) -> float:
        """log10 of the loss in nats per token of a model in which a token meets ``params``."""
        n, e = math.log10(params), math.log10(self.saturated(experts))
        return self.a * n + self.b * e + self.c * n * e + self.d

    def effective_params(self, params: float, experts: int) -> float:
        """Parameters of the dense model with the loss of this routed one.

        Beyond N = 10^(-b/c) routing no longer helps by this law, and the count falls below ``params``.
        """
        dense = math.log10(self.e_start)
        return float(10 ** ((self.log10_loss(params, experts) - self.d - self.b * dense) / (self.a + self.c * dense)))


# Table 3 of Clark et al.: 15M to 1.3B parameters, 1 to 512 experts, 130B tokens.
ROUTING_LAWS = {
    "s-base": RoutingLaw(a=-0.082, b=-0.108, c=0.009, d=1.104, e_start=1.847, e_max=314.478),
    "rl-r": RoutingLaw(a=-0.083, b=-0.126, c=0.012, d=1.111, e_start=1.880, e_max=469.982),
    "hash": RoutingLaw(a=-0.087, b=-0.136, c=0.012, d=1.157, e_start=4.175, e_max=477.741),
}
