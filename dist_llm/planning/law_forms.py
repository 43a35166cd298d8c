"""Scaling laws as functions to be fitted: the logarithm of the loss, and its derivatives, for many coefficient vectors at once.

A form works on centred logarithms: x = log N - mean log N, y = log D - mean log D, so that the logarithm of a term is its size in
the middle of the points and its slope, which hardly disturb one another. Published coefficients are the same numbers seen from
N = 1 and D = 1, a linear map away; ``outer`` and ``pin`` are that map.

Sources: L = E + A / N^alpha + B / D^beta is equation 2 of Hoffmann et al. (arXiv:2203.15556), in the log-sum-exp form of its
appendix D.2; L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D is equation 1.5 of Kaplan et al. (arXiv:2001.08361).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORMS", "ChinchillaForm", "ExpertsForm", "Form", "KaplanForm", "Matrix", "Points"]

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """Finished runs, one an entry.

    params: parameters, of experts all of them. tokens: seen in training. loss: nats per token. active: parameters a token meets;
    equal to ``params`` for a dense model. sources: where each came from, for messages.
    """

    params: Matrix
    tokens: Matrix
    loss: Matrix
    active: Matrix
    sources: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def flops(self) -> Matrix:
        """6 FLOPs an active parameter and token."""
        return 6.0 * self.active * self.tokens

    def take(self, keep: Any) -> Points:
        """The points that an index or a mask names."""
        index = np.arange(len(self))[keep]
        sources = tuple(self.sources[i] for i in index) if self.sources else ()
        return Points(self.params[index], self.tokens[index], self.loss[index], self.active[index], sources)


class Form:
    """A law with unknown coefficients.

    names: coefficients as published. logs: which of them are fitted by their logarithm. low, high: (p,) the outer coordinates
    (logarithms where they are fitted so) outside of which no interval is looked for. bounded: (p,) coordinates that are the same
    inside and out, and that a fit must not take beyond low and high.
    """

    name: str
    names: tuple[str, ...]
    logs: tuple[bool, ...]
    low: Matrix
    high: Matrix
    bounded: NDArray[np.bool_]

    def __init__(self, points: Points) -> None:
        self.x_mean = float(np.log(points.active).mean())
        self.y_mean = float(np.log(points.tokens).mean())

    def inputs(self, params: Matrix, tokens: Matrix, active: Matrix) -> Matrix:
        """(3, n): centred log of active parameters and of tokens, and log of total over active parameters."""
        return np.stack([np.log(active) - self.x_mean, np.log(tokens) - self.y_mean, np.log(params / active)])

    def predict(self, theta: Matrix, inputs: Matrix) -> tuple[Matrix, Matrix]:
        """Log loss (batch, n) and its derivatives (batch, n, p) at inner coordinates ``theta`` (batch, p)."""
        raise NotImplementedError

    def outer_map(self) -> Matrix:
        """(p, p): outer coordinates = map @ inner coordinates."""
        raise NotImplementedError

    def starts(self, log_loss: Matrix) -> Matrix:
        """(number, p) inner coordinates to search from; ``log_loss`` (n,) is what will be fitted."""
        raise NotImplementedError

    def outer(self, theta: Matrix) -> Matrix:
        """Outer coordinates (…, p) of inner ones."""
        return np.asarray(theta @ self.outer_map().T)

    def inner(self, outer: Matrix) -> Matrix:
        """Inner coordinates (…, p) of outer ones."""
        return np.asarray(outer @ np.linalg.inv(self.outer_map()).T)

    def values(self, outer: Matrix) -> dict[str, float]:
        """Published coefficients of one vector of outer coordinates; those beyond a float, of points without any slope, are 1e304."""
        return {n: float(np.exp(min(v, 700.0)) if log else v) for n, log, v in zip(self.names, self.logs, outer, strict=True)}


class ChinchillaForm(Form):
    """L = E + A / N^alpha + B / D^beta; inner coordinates (E, log of both terms in the middle, alpha, beta).

    E itself and not its logarithm: where the points leave room for E = 0 the logarithm has a plateau without end, on which a search
    stays.
    """

    name = "chinchilla"
    names: tuple[str, ...] = ("E", "A", "B", "alpha", "beta")
    logs: tuple[bool, ...] = (False, True, True, False, False)
    low = np.array([0.0, -20.0, -20.0, 0.0, 0.0])
    high = np.array([1e4, 100.0, 100.0, 4.0, 4.0])
    bounded = np.array([True, False, False, True, True])

    def predict(self, theta: Matrix, inputs: Matrix) -> tuple[Matrix, Matrix]:
        """See Form."""
        e, a, b, alpha, beta = (theta[:, i, None] for i in range(5))
        x, y = inputs[0], inputs[1]
        # Capped, so that a step far too long has an objective to be refused by and no overflow.
        in_n, in_d = np.exp(np.minimum(a - alpha * x, 300.0)), np.exp(np.minimum(b - beta * y, 300.0))
        loss = np.maximum(e + in_n + in_d, 1e-300)
        columns = [1.0 / loss, in_n / loss, in_d / loss, -in_n / loss * x, -in_d / loss * y]
        return np.log(loss), np.stack(columns, axis=-1)

    def outer_map(self) -> Matrix:
        """See Form."""
        m = np.eye(5)
        m[1, 3], m[2, 4] = self.x_mean, self.y_mean
        return m

    def starts(self, log_loss: Matrix) -> Matrix:
        """The published grid, 4,500 starts (appendix D.2), and ten that begin in the middle of the points.

        The grid was made for models of a billion parameters; seen from the points of a small ladder it can be all on one side.
        """
        grid = itertools.product(
            np.arange(-1, 1.5, 0.5), np.arange(0, 30, 5), np.arange(0, 30, 5), np.arange(0, 2.5, 0.5), np.arange(0, 2.5, 0.5)
        )
        published = np.array(list(grid), dtype=np.float64)
        published[:, 0] = np.exp(published[:, 0])
        published[:, 1] -= published[:, 3] * self.x_mean
        published[:, 2] -= published[:, 4] * self.y_mean
        least = float(log_loss.min())
        near = [
            (np.exp(least) * keep, least + np.log((1 - keep) / 2), least + np.log((1 - keep) / 2), slope, slope)
            for keep in (0.1, 0.3, 0.5, 0.7, 0.9)
            for slope in (0.2, 0.5)
        ]
        return np.concatenate([np.array(near), published])


class ExpertsForm(ChinchillaForm):
    """Chinchilla's law with effective parameters N_active * (N_total / N_active)^share.

    share = 0: only what a token meets counts; 1: every expert counts in full; 0.5 is the geometric mean, a rule of thumb.
    """

    name = "moe"
    names = (*ChinchillaForm.names, "share")
    logs = (*ChinchillaForm.logs, False)
    low = np.append(ChinchillaForm.low, -1.0)
    high = np.append(ChinchillaForm.high, 2.0)
    bounded = np.append(ChinchillaForm.bounded, True)

    def predict(self, theta: Matrix, inputs: Matrix) -> tuple[Matrix, Matrix]:
        """See Form."""
        w, alpha, extra = theta[:, 5, None], theta[:, 3, None], inputs[2]
        effective = np.stack(np.broadcast_arrays(inputs[0] + w * extra, inputs[1]))  # (2, batch, n)
        log_loss, dense = super().predict(theta[:, :5], effective)
        return log_loss, np.concatenate([dense, (-alpha * dense[..., 1] * extra)[..., None]], axis=-1)

    def outer_map(self) -> Matrix:
        """See Form."""
        m = np.eye(6)
        m[:5, :5] = super().outer_map()
        return m

    def starts(self, log_loss: Matrix) -> Matrix:
        """Those of the dense law, at three shares."""
        dense = super().starts(log_loss)
        return np.concatenate([np.concatenate([dense, np.full((len(dense), 1), w)], axis=1) for w in (0.0, 0.5, 1.0)])


class KaplanForm(Form):
    """L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D; inner coordinates are alpha_N, alpha_D and both terms in the middle.

    With u = alpha_N (log N_c - log N) / alpha_D and v = log D_c - log D, log L = alpha_D log(e^u + e^v). N_c and D_c are where a term
    alone would bring the loss to 1, far from the points; the map to the outer coordinates only shifts their logarithms.
    """

    name = "kaplan"
    names = ("alpha_N", "alpha_D", "N_c", "D_c")
    logs = (False, False, True, True)
    low = np.array([0.001, 0.005, -40.0, -40.0])
    high = np.array([3.0, 3.0, 200.0, 200.0])
    bounded = np.array([True, True, False, False])

    def predict(self, theta: Matrix, inputs: Matrix) -> tuple[Matrix, Matrix]:
        """See Form."""
        x, y = inputs[0], inputs[1]
        an, ad, nc, dc = (theta[:, i, None] for i in range(4))
        ratio = an / ad
        u, v = ratio * (nc - x), dc - y
        top = np.maximum(u, v)
        eu, ev = np.exp(u - top), np.exp(v - top)
        log_sum = top + np.log(eu + ev)
        share_n, share_d = eu / (eu + ev), ev / (eu + ev)
        columns = [share_n * (nc - x), log_sum - share_n * u, share_n * an, share_d * ad]
        return ad * log_sum, np.stack(columns, axis=-1)

    def outer_map(self) -> Matrix:
        """See Form: log N_c and log D_c are only shifted, which ``outer`` and ``inner`` do."""
        return np.eye(4)

    def outer(self, theta: Matrix) -> Matrix:
        """See Form."""
        return np.asarray(theta + np.array([0.0, 0.0, self.x_mean, self.y_mean]))

    def inner(self, outer: Matrix) -> Matrix:
        """See Form."""
        return np.asarray(outer - np.array([0.0, 0.0, self.x_mean, self.y_mean]))

    def starts(self, log_loss: Matrix) -> Matrix:
        """Slopes from 0.02 to 0.5, each term from a tenth to nearly the whole of the loss in the middle."""
        middle = float(np.median(log_loss))
        rows = [
            (an, ad, (middle + np.log(part)) / an, (middle + np.log(1 - part)) / ad)
            for an in (0.02, 0.05, 0.1, 0.2, 0.5)
            for ad in (0.02, 0.05, 0.1, 0.2, 0.5)
            for part in (0.1, 0.3, 0.5, 0.7, 0.9)
        ]
        return np.array(rows)


FORMS: dict[str, type[Form]] = {form.name: form for form in (ChinchillaForm, KaplanForm, ExpertsForm)}
