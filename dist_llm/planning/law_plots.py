"""The figure of a fit: loss against tokens and against size, the best size against compute, and errors of points left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_llm.planning.approaches import Frontier
from dist_llm.planning.fit import Fit
from dist_llm.planning.law_forms import Points
from dist_llm.utils.errors import StorageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_fit"]

_INK, _MUTED, _GRID = "#24292f", "#6e7781", "#d8dee4"
_BLUE, _ORANGE, _GREEN, _VIOLET = "#2166ac", "#c2570c", "#2d7f5e", "#7b4fa3"
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "svg.fonttype": "path",
}
_MOST_SIZES = 8  # lines that can be told apart


def draw_fit(fit: Fit, frontiers: Mapping[str, Frontier | str], path: Path, held_out: Points | None = None) -> None:
    """Write the figure of ``fit`` to ``path`` (.png, .svg or .pdf).

    Raises:
        StorageError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11.0, 8.0), layout="constrained")
        curves, valleys, sizes, errors = figure.subplots(2, 2).ravel()
        _draw_curves(curves, fit, held_out)
        _draw_valleys(valleys, fit)
        _draw_sizes(sizes, fit, frontiers)
        _draw_errors(errors, fit, held_out)
        try:
            figure.savefig(path, dpi=130)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}; choose another --plot") from error


def _colours(number: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.05 + 0.85 * i / max(1, number - 1)) for i in range(number)]


def _human(value: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def _draw_curves(ax: Axes, fit: Fit, held_out: Points | None) -> None:
    points = fit.points
    sizes = np.unique(points.active)
    shown = sizes[np.unique(np.linspace(0, len(sizes) - 1, _MOST_SIZES).astype(int))]
    lengths = points.tokens if held_out is None else np.append(points.tokens, held_out.tokens)
    tokens = np.geomspace(lengths.min() / 1.5, lengths.max() * 1.5, 80)
    for size, colour in zip(shown, _colours(len(shown)), strict=True):
        mine = points.take(points.active == size)
        total = float(mine.params[0])
        ax.plot(tokens, fit.predict(total, tokens, size), color=colour, lw=1.3)
        low, high = fit.band(np.full_like(tokens, total), tokens, active=np.full_like(tokens, size), measured=False)
        ax.fill_between(tokens, low, high, color=colour, alpha=0.18, lw=0)
        ax.plot(mine.tokens, mine.loss, "o", color=colour, ms=4.5, label=_human(size))
    if held_out is not None:
        for size in np.unique(held_out.active):
            mine = held_out.take(held_out.active == size)
            ax.plot(tokens, fit.predict(float(mine.params[0]), tokens, size), color=_ORANGE, lw=1.3, ls="--")
            ax.plot(mine.tokens, mine.loss, "D", color=_ORANGE, ms=5, label=f"{_human(size)}, held out")
    ax.set(xscale="log", xlabel="tokens", ylabel="loss, nats per token", title="Loss by size: points, fit, 95 % band")
    ax.legend(title="parameters", ncols=2, title_fontsize=8)


def _draw_valleys(ax: Axes, fit: Fit) -> None:
    points = fit.points
    made = np.unique(np.round(np.log(points.flops), 1))
    # The budgets that runs were made at, or where they are spread over all, five between the smallest and the largest.
    budgets = np.exp(made) if len(made) <= _MOST_SIZES else np.geomspace(points.flops.min(), points.flops.max(), 5)
    sizes = np.geomspace(points.active.min() / 2, points.active.max() * 2, 120)
    nearest = np.abs(np.log(points.flops[:, None] / budgets)).argmin(axis=1)
    close = np.abs(np.log(points.flops / budgets[nearest])) < 0.35
    for i, colour in enumerate(_colours(len(budgets))):
        loss = fit.predict(sizes, budgets[i] / (6 * sizes))
        keep = loss < 1.25 * loss.min()
        ax.plot(sizes[keep], loss[keep], color=colour, lw=1.3, label=f"{budgets[i]:.1e}")
        mine = points.take(close & (nearest == i))
        # A run of nearly this budget, moved along the law to exactly it.
        exact = fit.predict(mine.params, budgets[i] / (6 * mine.active), mine.active)
        ax.plot(mine.active, mine.loss * exact / fit.predict(mine.params, mine.tokens, mine.active), "o", color=colour, ms=4.5)
        bottom = int(loss.argmin())
        if 0 < bottom < len(sizes) - 1:
            ax.plot(sizes[bottom], loss[bottom], "v", color=_INK, ms=5)
    ax.set(xscale="log", xlabel="parameters", ylabel="loss, nats per token", title="IsoFLOP valleys: fit, runs near it, lowest point")
    ax.legend(title="FLOPs", ncols=2, title_fontsize=8)


def _draw_sizes(ax: Axes, fit: Fit, frontiers: Mapping[str, Frontier | str]) -> None:
    flops = np.geomspace(fit.points.flops.min(), fit.points.flops.max() * 30, 30)
    rows = []
    for c in flops:
        try:
            optimum = fit.optimal(float(c))
        except ValueError:
            break
        rows.append((optimum.best.params, *optimum.params))
    if len(rows) == len(flops):
        best, low, high = np.array(rows).T
        ax.plot(flops, best, color=_BLUE, lw=1.6, label=f"parametric fit ({fit.law})")
        ax.fill_between(flops, low, high, color=_BLUE, alpha=0.15, lw=0)
    for (name, found), colour, mark in zip(frontiers.items(), (_GREEN, _VIOLET), ("s", "^"), strict=True):
        if isinstance(found, str):
            continue
        every = max(1, len(found.flops) // 25)
        ax.plot(found.flops[::every], found.params[::every], mark, color=colour, ms=3, alpha=0.7)
        ax.plot(
            flops,
            [found.law.params(c) for c in flops],
            color=colour,
            lw=1.1,
            ls="--",
            label=f"{name.replace('_', ' ')}, a = {found.law.exponent:.2f}",
        )
    ax.plot(flops, np.sqrt(flops / 120), color=_MUTED, lw=1.0, ls=":", label="20 tokens a parameter")
    ax.axvline(fit.points.flops.max(), color=_MUTED, lw=0.8)
    ax.text(fit.points.flops.max() * 1.06, 0.03, "largest run", transform=ax.get_xaxis_transform(), color=_MUTED, fontsize=8)
    middle = [math.sqrt(c / 120) for c in (flops[0], flops[-1])]
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs, 6 N D",
        ylabel="parameters",
        title="Best size for a budget, 95 % band",
        ylim=(middle[0] / 30, middle[1] * 30),
    )
    ax.legend()


def _draw_errors(ax: Axes, fit: Fit, held_out: Points | None) -> None:
    points = fit.points
    left_out = 100 * np.expm1(fit.left_out)
    fitted = 100 * (fit.predict(points.params, points.tokens, points.active) / points.loss - 1)
    ax.axhline(0, color=_MUTED, lw=0.8)
    ax.vlines(points.flops, fitted, left_out, color=_BLUE, lw=0.8, alpha=0.5)
    ax.plot(points.flops, left_out, "o", color=_BLUE, ms=4.5, label="left out of the fit")
    ax.plot(points.flops, fitted, "_", color=_BLUE, ms=7, label="in the fit")
    if held_out is not None:
        error = 100 * (fit.predict(held_out.params, held_out.tokens, held_out.active) / held_out.loss - 1)
        ax.plot(held_out.flops, error, "D", color=_ORANGE, ms=5, label="largest sizes, held out")
    ax.set(xscale="log", xlabel="FLOPs, 6 N D", ylabel="predicted over measured, %", title="Error of the predicted loss")
    ax.legend()
