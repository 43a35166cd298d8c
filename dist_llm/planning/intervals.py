"""How well the points pin a law down: bootstrap, profile intervals, leave-one-out error.

An interval of a coefficient holds the values that the points cannot tell from the best one. For a value v the law is fitted again with
the coefficient held at v; the statistic is how much the objective rises, as a share of the best objective. Its cut-off comes from a
parametric bootstrap: data drawn around the fitted law, where the best value is known to be true, say how far the statistic goes by
chance. Inverting a test keeps the shape of the law (A and alpha, E and beta trade against one another over orders of magnitude) and
needs no estimate of the noise, which a fit of five coefficients to a dozen points hardly has.

What is computed from a law (an optimum, a predicted loss) gets percentiles of laws refitted to data drawn around the fit. Their noise is
the error of points left out of the fit, since fitted residuals shrink; this makes the percentiles too wide rather than too narrow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_llm.planning.law_forms import Form, Matrix
from dist_llm.planning.robust import huber, minimise_many, objective

__all__ = ["Uncertainty", "leave_one_out", "uncertainty"]

_STEPS_OUT = 40  # points of the profile on each side, from a tenth of a standard error to the edge of the box
_BISECTIONS = 30
_RESOLUTION = 1e-7  # log loss that no measurement tells apart: data made from a law without noise have intervals, too


@dataclass(frozen=True)
class Uncertainty:
    """samples: (number, p) inner coordinates refitted to bootstrap data. low, high: (p,) outer coordinates. is_open: (p, 2), the
    points say nothing against any value as far as the edge of the box on that side.
    """

    samples: Matrix
    low: Matrix
    high: Matrix
    is_open: NDArray[np.bool_]
    level: float


def leave_one_out(form: Form, theta: Matrix, inputs: Matrix, log_loss: Matrix) -> Matrix:
    """(n,) log loss predicted for each point by a fit to the others, minus the measured one. theta (p,) is the fit to all."""
    n = len(log_loss)
    others, _ = minimise_many(form, np.repeat(theta[None], n, axis=0), inputs, log_loss, weights=1.0 - np.eye(n))
    return np.asarray(form.predict(others, inputs)[0].diagonal() - log_loss)


def uncertainty(
    form: Form, theta: Matrix, inputs: Matrix, log_loss: Matrix, left_out: Matrix, *, level: float, samples: int, seed: int
) -> Uncertainty:
    """Bootstrap the fit ``theta`` (p,) and invert its tests.

    Args:
        form: the law.
        theta: inner coordinates of the fit.
        inputs: (3, n).
        log_loss: (n,).
        left_out: (n,) of ``leave_one_out``.
        level: of each coefficient's interval, 0 to 1.
        samples: bootstrap data sets.
        seed: of their random numbers.
    """
    rng = np.random.default_rng(seed)
    n = len(log_loss)
    drawn = rng.choice(left_out, (samples, n)) * rng.choice([-1.0, 1.0], (samples, n))
    noise = max(float(np.sqrt(np.mean(left_out**2))), _RESOLUTION)
    normal = noise * rng.standard_normal((samples, n))
    data = form.predict(theta[None], inputs)[0] + drawn
    refitted, _ = minimise_many(form, np.repeat(theta[None], samples, axis=0), inputs, data)

    cutoff = _cutoffs(_Tangent(form, theta, inputs), inputs, normal, level)
    low, high, is_open = _invert(form, theta, inputs, log_loss, cutoff, refitted)
    return Uncertainty(refitted, low, high, is_open, level)


class _Tangent(Form):
    """The law near the fit, where its logarithm is linear in the coefficients: without a box, for the distribution of the statistic.

    At the edge of its box (E near 0) the law itself has fewer coefficients to move, and its statistic would look too small.
    """

    def __init__(self, form: Form, theta: Matrix, inputs: Matrix) -> None:
        self.jacobian = form.predict(theta[None], inputs)[1][0]
        self.outer_of_inner = form.outer_map()
        self.bounded = np.zeros(len(theta), dtype=bool)
        self.low = self.high = np.zeros(len(theta))

    def predict(self, theta: Matrix, inputs: Matrix) -> tuple[Matrix, Matrix]:
        """See Form."""
        del inputs
        return theta @ self.jacobian.T, np.repeat(self.jacobian[None], len(theta), axis=0)

    def outer_map(self) -> Matrix:
        """See Form."""
        return self.outer_of_inner


def _cutoffs(form: Form, inputs: Matrix, noise: Matrix, level: float) -> Matrix:
    # (p,) quantiles of the statistic where 0 is the truth and ``noise`` (samples, n) the data.
    p = len(form.bounded)
    start = np.zeros((len(noise), p))
    _, free = minimise_many(form, start, inputs, noise)
    statistic = np.empty((p, len(noise)))
    for k in range(p):
        _, restricted = minimise_many(form, start, inputs, noise, held=k)
        lowest = np.minimum(free, restricted)  # either search may have stopped a little above a minimum that both share
        statistic[k] = (restricted - lowest) / lowest
    # For least squares the statistic has one distribution whatever is held, F(1, n - p) / (n - p); for Huber's loss nearly so. All
    # together say more about its far tail than each alone.
    return np.maximum(np.quantile(statistic, level, axis=1), np.quantile(statistic, level))


def _invert(
    form: Form, theta: Matrix, inputs: Matrix, log_loss: Matrix, cutoff: Matrix, refitted: Matrix
) -> tuple[Matrix, Matrix, NDArray[np.bool_]]:
    p = len(theta)
    floor = float(huber(np.full(len(log_loss), _RESOLUTION)).sum())
    best = max(float(objective(form, theta[None], inputs, log_loss)[0]), floor)
    centre = form.outer(theta)
    spread = np.cov(form.outer(refitted).T)
    # Which way the others go when one coefficient is moved: the regression on it over the bootstrap.
    along = spread / np.maximum(np.diag(spread), 1e-300)
    error = np.maximum(np.sqrt(np.diag(spread)), 1e-6)

    def exceeds(k: NDArray[np.int_], value: Matrix) -> NDArray[np.bool_]:
        # Is the objective, with coefficient k[i] held at value[i], beyond its cut-off?
        moved = centre + along[:, k].T * (value - centre[k])[:, None]
        plain = np.repeat(centre[None], len(k), axis=0)
        lowest = np.full(len(k), np.inf)
        for start in (moved, plain):
            inside = np.where(form.bounded, np.clip(start, form.low, form.high), start)
            inside[np.arange(len(k)), k] = value
            _, reached = minimise_many(form, form.inner(inside), inputs, log_loss, held=k)
            lowest = np.minimum(lowest, reached)
        return np.asarray(lowest - best > cutoff[k] * best)

    coefficient = np.repeat(np.arange(p), 2)
    edge = np.stack([form.low, form.high], axis=1).ravel()
    room = np.abs(edge - centre[coefficient])
    first = np.minimum(0.1 * error[coefficient], room)
    share = np.linspace(0.0, 1.0, _STEPS_OUT)
    distance = first[:, None] * np.maximum(room / np.maximum(first, 1e-300), 1.0)[:, None] ** share  # (2 p, steps), geometric
    sign = np.tile([-1.0, 1.0], p)
    values = centre[coefficient][:, None] + sign[:, None] * distance
    out = exceeds(np.repeat(coefficient, _STEPS_OUT), values.ravel()).reshape(values.shape)
    is_open = ~out.any(axis=1)
    crossing = np.where(is_open, _STEPS_OUT - 1, out.argmax(axis=1))
    rows = np.arange(2 * p)
    outside = values[rows, crossing]
    within = np.where(crossing > 0, values[rows, np.maximum(crossing - 1, 0)], centre[coefficient])
    for _ in range(_BISECTIONS if not is_open.all() else 0):
        middle = 0.5 * (within + outside)
        beyond = exceeds(coefficient, middle)
        outside, within = np.where(beyond, middle, outside), np.where(beyond, within, middle)
    bounds = np.where(is_open, edge, outside).reshape(p, 2)
    return bounds[:, 0], bounds[:, 1], is_open.reshape(p, 2)
