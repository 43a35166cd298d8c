"""The third approach: a law fitted to finished runs, with intervals, leave-one-out error and what to run next.

Hoffmann et al. (arXiv:2203.15556, section 3.3 and appendix D.2): Huber's loss with width 1e-3 on the logarithm of the loss, minimised
by L-BFGS from a grid of starts. The grid's starts are ranked by the objective, the best go through L-BFGS with the analytic gradient,
and the winner is finished by reweighted least squares, which reaches the same minimum to more digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_llm.planning.experts import effective_params
from dist_llm.planning.intervals import Uncertainty, leave_one_out, uncertainty
from dist_llm.planning.law_forms import FORMS, Form, Matrix, Points
from dist_llm.planning.laws import ChinchillaLaw, KaplanLaw, Optimum
from dist_llm.planning.robust import DELTA, minimise_many, objective
from dist_llm.utils.errors import ConfigError

__all__ = ["JOINT_LEVEL", "Advice", "Fit", "OptimumInterval", "fit_law", "fit_quality"]

# All coefficients of a fit lie in their intervals together in at least this share of repetitions: each interval is made at the level
# 1 - (1 - JOINT_LEVEL) / coefficients (Bonferroni).
JOINT_LEVEL = 0.98
_STARTS_REWEIGHTED, _STARTS_LBFGS = 200, 16


@dataclass(frozen=True)
class OptimumInterval:
    """An optimum and the 2.5 and 97.5 percentiles of the bootstrap for each of its numbers."""

    best: Optimum
    params: tuple[float, float]
    tokens: tuple[float, float]
    loss: tuple[float, float]


@dataclass(frozen=True)
class Advice:
    """The affordable run that says most about the loss at the target."""

    params: float
    tokens: float
    flops: float
    loss: float  # predicted
    target_flops: float
    error_now: float  # standard error of the log loss at the target
    error_then: float  # with this run


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    coefficients, interval: by published name; an interval is open on a side (``open_sides``: "E low") where the points speak against
    no value up to the edge of what is looked at. rms: of log loss. left_out: (n,) log loss predicted without a point minus measured.
    """

    law: str
    points: Points
    coefficients: dict[str, float]
    interval: dict[str, tuple[float, float]]
    open_sides: tuple[str, ...]
    level_joint: float
    level_each: float
    rms: float
    left_out: Matrix
    samples: Matrix  # (number, p) outer coordinates of the bootstrap
    form: Form
    theta: Matrix

    def predict(self, params: Any, tokens: Any, active: Any = None) -> Matrix:
        """Loss in nats per token; params all, ``active`` those a token meets (default params). Arrays broadcast."""
        n, d = np.broadcast_arrays(np.asarray(params, dtype=np.float64), np.asarray(tokens, dtype=np.float64))
        a = n if active is None else np.broadcast_to(np.asarray(active, dtype=np.float64), n.shape)
        flat = self.form.inputs(n.ravel(), d.ravel(), a.ravel())
        return np.asarray(np.exp(self.form.predict(self.theta[None], flat)[0][0]).reshape(n.shape))

    def band(self, params: Any, tokens: Any, *, active: Any = None, measured: bool = True) -> tuple[Matrix, Matrix]:
        """2.5 and 97.5 percentiles of the loss over the bootstrap, (n,) each; ``measured`` adds the noise that one run has."""
        n, d = (np.asarray(v, dtype=np.float64).ravel() for v in np.broadcast_arrays(params, tokens))
        logs = self._sampled(n, d, None if active is None else np.asarray(active, dtype=np.float64).ravel())
        if measured:
            logs = logs + np.random.default_rng(0).choice(self.left_out, logs.shape) * np.random.default_rng(1).choice(
                [-1.0, 1.0], logs.shape
            )
        low, high = np.quantile(np.exp(logs), (0.025, 0.975), axis=0)
        return np.asarray(low), np.asarray(high)

    def curve(self) -> ChinchillaLaw | KaplanLaw:
        """The fitted law of a dense model (for ``moe``: of the effective parameters)."""
        return _curve(self.law, self.coefficients)

    def effective_params(self, active: float, total: float) -> float:
        """What a mixture of experts counts in this law; ``total`` for a law that does not tell them apart."""
        return effective_params(active, total, self.coefficients["share"]) if self.law == "moe" else total

    def optimal(self, flops: float) -> OptimumInterval:
        """The best dense model for ``flops``, from the fit and from each bootstrap sample that has an optimum.

        Raises:
            ValueError: the fitted law has none: parameters or tokens make no difference in the points.
        """
        best = best_of(self.curve(), flops)
        if best is None:
            raise ValueError("the fitted law has no best size: by these runs parameters or tokens make no difference")
        sampled = (best_of(_curve(self.law, self.form.values(outer)), flops) for outer in self.samples)
        found = [(b.params, b.tokens, b.loss) for b in sampled if b is not None] or [(best.params, best.tokens, best.loss)]
        low, high = np.quantile(np.array(found), (0.025, 0.975), axis=0)
        spans = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
        return OptimumInterval(best, spans[0], spans[1], spans[2])

    def next_run(self, target_flops: float, most_flops: float) -> Advice:
        """The dense run of at most ``most_flops`` that narrows the predicted loss at the optimum of ``target_flops`` most.

        Over the bootstrap, predictions of a candidate and of the target vary together; measuring the candidate, with the noise seen so
        far, leaves var(target) - cov^2 / (var(candidate) + noise^2) (linear Gaussian update; a c-optimal design of one point).
        """
        target = best_of(self.curve(), target_flops)
        if target is None:
            raise ValueError("the fitted law has no best size to aim at")
        size, length = self.points.active, self.points.tokens
        sizes = np.geomspace(size.min(), 4 * size.max(), 25)
        lengths = np.geomspace(length.min(), 4 * length.max(), 25)
        n, d = (grid.ravel() for grid in np.meshgrid(sizes, lengths))
        keep = 6.0 * n * d <= most_flops * (1 + 1e-9)
        if not keep.any():
            raise ValueError(f"no run near the sizes measured costs at most {most_flops:.3g} FLOPs")
        n, d = n[keep], d[keep]
        logs = self._sampled(np.append(n, target.params), np.append(d, target.tokens))
        logs = logs - logs.mean(axis=0)
        aim, runs = logs[:, -1], logs[:, :-1]
        noise = float(np.sqrt(np.mean(self.left_out**2)))
        gain = (runs * aim[:, None]).mean(axis=0) ** 2 / ((runs**2).mean(axis=0) + noise**2)
        best = int(gain.argmax())
        now = float((aim**2).mean())
        loss = float(self.predict(n[best], d[best]))
        return Advice(
            float(n[best]),
            float(d[best]),
            float(6 * n[best] * d[best]),
            loss,
            target_flops,
            now**0.5,
            max(now - float(gain[best]), 0.0) ** 0.5,
        )

    def _sampled(self, params: Matrix, tokens: Matrix, active: Matrix | None = None) -> Matrix:
        # (samples, n) log loss
        return self.form.predict(self.form.inner(self.samples), self.form.inputs(params, tokens, params if active is None else active))[0]


def best_of(law: ChinchillaLaw | KaplanLaw, flops: float) -> Optimum | None:
    """The optimum of a law, if it has one that floating point can hold."""
    try:
        best = law.optimal(flops)
    except (ValueError, OverflowError, ZeroDivisionError):
        return None
    return best if 0 < best.params < np.inf and 0 < best.tokens < np.inf and best.loss < np.inf else None


def _curve(law: str, values: dict[str, float]) -> ChinchillaLaw | KaplanLaw:
    if law == "kaplan":
        return KaplanLaw(**values)
    return ChinchillaLaw(**{name: values[name] for name in ("E", "A", "B", "alpha", "beta")})


def fit_law(points: Points, law: str = "chinchilla", *, samples: int = 1000, seed: int = 0) -> Fit:
    """Fit ``law`` ("chinchilla", "kaplan" or "moe") to finished runs.

    Args:
        points: one a run.
        law: which.
        samples: bootstrap data sets.
        seed: of the bootstrap.

    Raises:
        ConfigError: too few points, or too alike, for as many coefficients.
    """
    form = FORMS[law](points)
    check_enough(points, form)
    inputs = form.inputs(points.params, points.tokens, points.active)
    log_loss = np.log(points.loss)
    theta = minimise(form, inputs, log_loss)
    left_out = leave_one_out(form, theta, inputs, log_loss)
    level = 1 - (1 - JOINT_LEVEL) / len(form.names)
    around: Uncertainty = uncertainty(form, theta, inputs, log_loss, left_out, level=level, samples=samples, seed=seed)
    low, high = form.values(around.low), form.values(around.high)
    residual = form.predict(theta[None], inputs)[0][0] - log_loss
    return Fit(
        law=law,
        points=points,
        coefficients=form.values(form.outer(theta)),
        interval={name: (low[name], high[name]) for name in form.names},
        open_sides=tuple(
            f"{name} {side}"
            for name, row in zip(form.names, around.is_open, strict=True)
            for side, o in zip(("low", "high"), row, strict=True)
            if o
        ),
        level_joint=JOINT_LEVEL,
        level_each=level,
        rms=float(np.sqrt(np.mean(residual**2))),
        left_out=left_out,
        samples=form.outer(around.samples),
        form=form,
        theta=theta,
    )


def fit_quality(points: Points, law: str) -> dict[str, Any]:
    """Another law beside: its coefficients and errors, without intervals.

    Raises:
        ConfigError: too few points, or too alike.
    """
    form = FORMS[law](points)
    check_enough(points, form)
    inputs, log_loss = form.inputs(points.params, points.tokens, points.active), np.log(points.loss)
    theta = minimise(form, inputs, log_loss)
    left_out = leave_one_out(form, theta, inputs, log_loss)
    residual = form.predict(theta[None], inputs)[0][0] - log_loss
    return {
        **form.values(form.outer(theta)),
        "rms_log_loss": float(np.sqrt(np.mean(residual**2))),
        "left_out_rms_log_loss": float(np.sqrt(np.mean(left_out**2))),
    }


def check_enough(points: Points, form: Form) -> None:
    """Refuse points that cannot pin the coefficients down.

    Raises:
        ConfigError: with what is missing.
    """
    count = len(form.names)
    if len(points) <= count:
        raise ConfigError(
            f"{len(points)} points are too few for the {form.name} law: it has {count} coefficients, so {count + 1} points are the least, "
            "and a dozen a useful number; add runs"
        )
    for name, values in (("params", points.active), ("tokens", points.tokens)):
        if len(np.unique(values)) < 3:
            raise ConfigError(
                f"the points have only {len(np.unique(values))} different value(s) of {name}; at least 3 are needed to see a power law in it"
            )
    if form.name == "moe" and len(np.unique(points.params / points.active)) < 2:
        raise ConfigError(
            "every point has the same total to active parameters: add runs with other numbers of experts, or use --law chinchilla"
        )


def minimise(form: Form, inputs: Matrix, log_loss: Matrix) -> Matrix:
    """(p,) inner coordinates of the smallest objective found."""
    from scipy.optimize import minimize

    starts = form.starts(log_loss)
    starts = np.where(form.bounded, np.clip(starts, form.low, form.high), starts)
    order = np.argsort(objective(form, starts, inputs, log_loss), kind="stable")
    bounds = [(lo, hi) if b else (None, None) for lo, hi, b in zip(form.low, form.high, form.bounded, strict=True)]

    def value_and_gradient(theta: Matrix) -> tuple[float, Matrix]:
        value, jacobian = form.predict(theta[None], inputs)
        residual = value[0] - log_loss
        size = np.abs(residual)
        total = np.where(size <= DELTA, 0.5 * size * size / DELTA, size - 0.5 * DELTA).sum()
        return float(total), np.clip(residual / DELTA, -1.0, 1.0) @ jacobian[0]

    searched = [
        minimize(
            value_and_gradient, starts[i], jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500, "ftol": 1e-12, "gtol": 1e-9}
        ).x
        for i in order[:_STARTS_LBFGS]
    ]
    rough, reached = minimise_many(form, np.concatenate([np.array(searched), starts[order[:_STARTS_REWEIGHTED]]]), inputs, log_loss)
    finished, reached = minimise_many(form, rough[np.argsort(reached)[:5]], inputs, log_loss, max_steps=5000, tolerance=1e-10)
    return np.asarray(finished[reached.argmin()])
