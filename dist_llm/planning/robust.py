"""Huber regression of a law, for many data sets or many starts at once.

The objective is sum_i huber(log L_model - log L_i) with the width of Hoffmann et al. (arXiv:2203.15556, appendix D.2), 1e-3. It is a sum
and not a mean, and divided by the width: with the mean, L-BFGS meets its default tolerance far from the minimum, which is what Besiroglu
et al. (arXiv:2404.10102) found behind the published coefficients' narrow intervals.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_llm.planning.law_forms import Form, Matrix

__all__ = ["DELTA", "huber", "minimise_many", "objective"]

DELTA = 1e-3


def huber(residuals: Matrix) -> Matrix:
    """Huber's loss of residuals in log loss, in units of DELTA: about |r| beyond DELTA."""
    size = np.abs(residuals)
    return np.where(size <= DELTA, 0.5 * size * size / DELTA, size - 0.5 * DELTA)


def objective(form: Form, theta: Matrix, inputs: Matrix, log_loss: Matrix) -> Matrix:
    """(batch,) objective at inner coordinates theta (batch, p); log_loss is (n,) or (batch, n)."""
    return np.asarray(huber(form.predict(theta, inputs)[0] - log_loss).sum(axis=-1))


def minimise_many(
    form: Form,
    theta: Matrix,
    inputs: Matrix,
    log_loss: Matrix,
    *,
    held: NDArray[np.int_] | int | None = None,
    weights: Matrix | None = None,
    max_steps: int = 200,
    tolerance: float = 1e-5,
) -> tuple[Matrix, Matrix]:
    """Minima of the objective near each start, all searched at once.

    Each step solves the least-squares problem whose weights make it touch Huber's loss from above (iterated reweighting), damped as by
    Levenberg and Marquardt so that no step climbs.

    Args:
        form: the law.
        theta: (batch, p) starts, inside the form's bounds.
        inputs: (3, n) of ``form.inputs``.
        log_loss: (batch, n) or (n,).
        held: outer coordinate that keeps its value in each search, or one for all; default none.
        weights: (batch, n) or (n,) how often each point counts.
        max_steps: at most.
        tolerance: a search ends when the objective falls by less than this share in three steps running.

    Returns:
        theta (batch, p) and objective (batch,).
    """
    theta = np.array(theta, dtype=np.float64)
    batch, p = theta.shape
    n = inputs.shape[1]
    target = np.broadcast_to(log_loss, (batch, n))
    counts = np.broadcast_to(np.ones(n) if weights is None else weights, (batch, n))
    # Columns are directions of search. Where a coefficient is held they are the outer coordinates, all but that one.
    free = np.broadcast_to(np.eye(p) if held is None else np.linalg.inv(form.outer_map()), (batch, p, p))
    fixed = np.zeros((batch, p), dtype=bool)
    if held is not None:
        fixed[np.arange(batch), held] = True
    low, high = np.where(form.bounded, form.low, -np.inf), np.where(form.bounded, form.high, np.inf)

    damping = np.full(batch, 1e-3)
    stalled = np.zeros(batch, dtype=int)
    value, jacobian = form.predict(theta, inputs)
    residual = value - target
    best = (counts * huber(residual)).sum(axis=1)
    active = np.arange(batch)
    for _ in range(max_steps):
        r, jac = residual[active], jacobian[active] @ free[active]
        w = counts[active] / np.maximum(np.abs(r), DELTA)
        gradient = np.einsum("bnk,bn->bk", jac, w * r)
        curvature = np.einsum("bnk,bnl->bkl", jac * w[..., None], jac)
        # A coordinate at its bound that wants to go beyond it stays for this step.
        stuck = fixed[active] | (theta[active] <= low) & (gradient > 0) | (theta[active] >= high) & (gradient < 0)
        gradient = np.where(stuck, 0.0, gradient)
        curvature = np.where(stuck[:, :, None] | stuck[:, None, :], 0.0, curvature)
        diagonal = np.einsum("bkk->bk", curvature)
        # The second part keeps a direction that no point feels (a vanished term) from making the system singular.
        scale = damping[active, None] * diagonal + 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-30 + stuck
        step = np.linalg.solve(curvature + scale[..., None] * np.eye(p), -gradient[..., None])
        tried = np.clip(theta[active] + (free[active] @ step)[..., 0], low, high)
        new_value, new_jacobian = form.predict(tried, inputs)
        new_residual = new_value - target[active]
        new = (counts[active] * huber(new_residual)).sum(axis=1)
        gain = best[active] - new
        better = np.isfinite(new) & (gain >= 0)
        small = better & (gain <= tolerance * best[active]) | ~better & (damping[active] > 1e8)
        moved = active[better]
        theta[moved], residual[moved], jacobian[moved], best[moved] = tried[better], new_residual[better], new_jacobian[better], new[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 10, 1e-9), damping[active] * 10)
        stalled[active] = np.where(small, stalled[active] + 1, np.where(better, 0, stalled[active]))
        active = active[stalled[active] < 3]
        if not len(active):
            break
    return theta, best
