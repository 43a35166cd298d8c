"""The figures of a run: what it learned, how it was driven, where the time went.

Each figure is drawn once and saved twice: as a PNG file, and as SVG text for the report. The SVG names its ink by
CSS variables, so that the same drawing is readable on a light and on a dark page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from dist_llm.report.pipeline_plot import caption, draw_timeline, height_inches
from dist_llm.report.run import RunData, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Drawing", "draw_figures"]

# What matplotlib draws with, and what the page calls it. The values are the light theme's; PNG files have them.
_INK, _MUTED, _GRID, _PAGE = "#24292f", "#6e7781", "#d8dee4", "#ffffff"
_BLUE, _ORANGE, _GREEN, _VIOLET = "#2166ac", "#c2570c", "#2d7f5e", "#7b4fa3"
_THEME = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _PAGE: "page", _BLUE: "blue", _ORANGE: "orange", _GREEN: "green", _VIOLET: "violet"}
_POINTS = 1500  # more than a screen has columns
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",  # the page must not depend on the reader's fonts
}


@dataclass(frozen=True)
class Drawing:
    """One figure, as a file's bytes and as text for the page."""

    name: str
    caption: str
    png: bytes
    svg: str


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over about ``window`` values, taken twice so that a spike becomes a hill and not a box.

    The window shrinks towards both ends, evenly on both sides, so that a falling curve is not shifted.
    """
    half = max(0, window // 4)
    out = list(values)
    for _ in range(2):
        sums = list(accumulate(out, initial=0.0))
        reach = [min(half, i, len(out) - 1 - i) for i in range(len(out))]
        out = [(sums[i + r + 1] - sums[i - r]) / (2 * r + 1) for i, r in enumerate(reach)]
    return out


def thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most ``2 * _POINTS`` points: the smallest and the largest of each stretch, so that no spike disappears."""
    if len(steps) <= 2 * _POINTS:
        return list(steps), list(values)
    kept: list[int] = []
    edges = [round(i * len(steps) / _POINTS) for i in range(_POINTS + 1)]
    for begin, end in pairwise(edges):
        stretch = range(begin, end)
        kept += sorted({min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)})
    return [steps[i] for i in kept], [values[i] for i in kept]


def _focus(ax: Axes, values: Sequence[float], *, from_zero: bool = False) -> None:
    # Show nearly all values: one outlier in fifty (a first step, a pause) must not flatten the rest.
    ordered = sorted(values)
    low, high = ordered[int(0.01 * (len(ordered) - 1))], ordered[math.ceil(0.98 * (len(ordered) - 1))]
    if from_zero:
        low = 0.0
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    ax.set_ylim(0.0 if from_zero else low - room, high + (2 if from_zero else 1) * room)


def _empty(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=_MUTED)
    ax.set_yticks([])
    ax.grid(False)


def _legend(figure: Figure, ax: Axes) -> None:
    # Below the panels, where it can hide nothing.
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))


def _step_axis(ax: Axes, run: RunData) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = {r["step"] for r in (*run.train, *run.evals)}
    if not ax.has_data() or not steps:
        ax.set_xticks([])
        return
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if len(steps) == 1:
        (step,) = steps
        ax.set_xlim(step - 1, step + 1)


def _dots(steps: Sequence[int]) -> str | None:
    return "o" if len(steps) == 1 else None  # a line of one point is invisible


def _curve(ax: Axes, run: RunData, name: str) -> None:
    steps, values = numbers(run.train, name)
    eval_steps, evals = numbers(run.evals, name)
    if not values and not evals:
        _empty(ax, "nothing recorded yet")
        return
    if values:
        window = len(values) // 30
        ax.plot(*thin(steps, values), color=_BLUE, alpha=0.28, lw=0.8, marker=_dots(steps))
        ax.plot(
            *thin(steps, smooth(values, window)),
            color=_BLUE,
            lw=1.7,
            marker=_dots(steps),
            label=f"training, mean over {window} steps" if window >= 4 else "training",
        )
    if evals:
        ax.plot(eval_steps, evals, color=_ORANGE, lw=1.2, marker="o", ms=4.5, label="held out")


def _loss(figure: Figure, run: RunData) -> str:
    loss, bits = figure.subplots(1, 2)
    loss.set(title="Loss", xlabel="step", ylabel="nats per token")
    _curve(loss, run, "loss")
    bits.set(title="Bits per byte", xlabel="step", ylabel="bits per byte of text")
    baselines = run.results.get("baselines") or {}
    for key, label in (("lzma_bits_per_byte", "lzma -9"), ("byte_unigram_entropy", "byte-unigram entropy")):
        if isinstance(baselines.get(key), int | float):
            bits.axhline(baselines[key], color=_GREEN if key.startswith("lzma") else _VIOLET, lw=1.1, ls="--", label=label)
    _curve(bits, run, "bits_per_byte")
    _legend(figure, bits)
    return "Training and held-out loss, per token and per byte of the original text."


def _drive(figure: Figure, run: RunData) -> str:
    rate, norm = figure.subplots(1, 2)
    rate.set(title="Learning rate", xlabel="step", ylabel="learning rate")
    steps, values = numbers(run.train, "lr")
    if values:
        rate.plot(*thin(steps, values), color=_BLUE, lw=1.7, marker=_dots(steps))
        rate.set_ylim(0, 1.08 * max(values) or 1.0)
        rate.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        _empty(rate, "nothing recorded yet")
    norm.set(title="Gradient norm, before clipping", xlabel="step", ylabel="norm of the gradient")
    steps, values = numbers(run.train, "grad_norm")
    if values:
        norm.plot(*thin(steps, values), color=_VIOLET, alpha=0.35, lw=0.8, marker=_dots(steps))
        norm.plot(*thin(steps, smooth(values, len(values) // 30)), color=_VIOLET, lw=1.7, marker=_dots(steps))
        _focus(norm, values, from_zero=True)
        top = max(range(len(values)), key=values.__getitem__)
        norm.text(
            0.98, 0.96, f"largest: {values[top]:.3g} at step {steps[top]}", transform=norm.transAxes, ha="right", va="top", color=_MUTED
        )
    else:
        _empty(norm, "nothing recorded yet")
    return "What drove the run: the schedule, and how steep the loss was."


def _time(figure: Figure, run: RunData) -> str:
    speed, split = figure.subplots(1, 2)
    speed.set(title="Throughput", xlabel="step", ylabel="tokens per second")
    steps, values = numbers(run.train, "tokens_per_s")
    if values:
        speed.plot(*thin(steps, values), color=_GREEN, alpha=0.35, lw=0.8, marker=_dots(steps))
        speed.plot(*thin(steps, smooth(values, len(values) // 30)), color=_GREEN, lw=1.7, marker=_dots(steps))
        _focus(speed, values, from_zero=True)
        speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    else:
        _empty(speed, "nothing recorded yet")
    split.set(title="Where the time of a step goes", xlabel="step", ylabel="milliseconds")
    _stack(split, run)
    _legend(figure, split)
    return "Speed over all ranks, and the time of a step: waiting for data, communicating, computing and the rest."


def _stack(ax: Axes, run: RunData) -> None:
    timed = [r for r in run.train if numbers([r], "step_s")[1]]
    if not timed:
        _empty(ax, "nothing recorded yet")
        return
    # Means of equal stretches: a stack of raw steps is a comb.
    size = max(1, len(timed) // 120)
    stretches = [timed[i : i + size] for i in range(0, len(timed), size)]
    at = [s[-1]["step"] for s in stretches]

    def means(name: str) -> list[float]:
        return [1e3 * sum(numbers(s, name)[1]) / len(s) for s in stretches]

    whole, data, comm = means("step_s"), means("data_s"), means("comm_s")
    rest = [max(0.0, w - d - c) for w, d, c in zip(whole, data, comm, strict=True)]
    layers = (rest, comm, data)
    labels, colours = ("compute and the rest", "communication", "data"), (_BLUE, _ORANGE, _GREEN)
    if len(at) == 1:
        bottom = 0.0
        for (value,), label, colour in zip(layers, labels, colours, strict=True):
            ax.bar(at, [value], bottom=bottom, width=0.5, label=label, color=colour, alpha=0.8)
            bottom += value
    else:
        ax.stackplot(at, *layers, labels=labels, colors=colours, alpha=0.8, lw=0)
        _focus(ax, whole, from_zero=True)
        ax.margins(x=0.02)


def _pipeline(figure: Figure, run: RunData) -> str:
    figure.set_figheight(height_inches(run.timelines[-1]))
    ax = figure.subplots()
    draw_timeline(ax, run.timelines[-1], colors=(_BLUE, _ORANGE), page=_PAGE, ink=_INK)
    _legend(figure, ax)
    return caption(run.timelines)


def _svg(figure: Figure, name: str) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # inside HTML they say nothing
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-labelledby="caption-{name}">', text, count=1)
    for colour, variable in _THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    # Several drawings share the page: ids must differ.
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)


_FIGURES: tuple[tuple[str, Callable[[Any, RunData], str]], ...] = (("loss", _loss), ("schedule", _drive), ("time", _time))


def draw_figures(run: RunData) -> list[Drawing]:
    """Draw every figure of a run; a panel without numbers says so, and only a pipeline has a timeline."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawings = []
    for name, draw in (*_FIGURES, ("pipeline", _pipeline)) if run.timelines else _FIGURES:
        # hashsalt: the same run gives the same bytes.
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
            figure = Figure(figsize=(10.4, 3.9), layout=ConstrainedLayoutEngine(wspace=0.05))
            caption = draw(figure, run)
            for ax in figure.axes:
                if ax.get_xlabel() == "step":
                    _step_axis(ax, run)
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=130, facecolor="white")
            drawings.append(Drawing(name, caption, png.getvalue(), _svg(figure, name)))
    return drawings
