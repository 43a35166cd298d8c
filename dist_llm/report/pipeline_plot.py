"""The drawing of a pipeline's timeline: a row a stage, a bar an action.

A step of a large pipeline has tens of thousands of actions. All bars of one colour are one path, so that the report stays small,
and beyond a limit only the first are drawn, which the caption says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dist_llm.report.timeline import StepTimeline, TimedAction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import PathPatch

__all__ = ["caption", "draw_timeline", "height_inches"]

_DRAWN = 8000
_BAR = 0.74  # of a row's height
_DIGIT_INCHES = 0.085  # of a label, with room on both sides
_AXES_INCHES = 9.2
_ROW_INCHES = 0.42


def height_inches(timeline: StepTimeline) -> float:
    """Of the whole figure: rows of equal height, until they must become thinner."""
    return min(9.0, 1.6 + _ROW_INCHES * timeline.num_stages)


def draw_timeline(ax: Axes, timeline: StepTimeline, *, colors: tuple[str, str], page: str, ink: str) -> None:
    """Draw the actions of a step.

    Args:
        ax: to draw on.
        timeline: what to draw.
        colors: of forwards and backwards; later chunks of a stage are paler.
        page: of what is behind the bars, in which numbers on full colours and the lines between bars are drawn.
        ink: of numbers on pale colours.
    """
    shown = sorted(timeline.actions, key=lambda a: a.start_s)[:_DRAWN]
    end = max(a.end_s for a in shown)
    inches_per_s = _AXES_INCHES / end if end > 0 else 0.0
    # A hairline between bars that touch, unless it would hide them.
    line = 0.7 if min(a.end_s - a.start_s for a in shown) * inches_per_s > 0.05 else 0.0
    scale, unit = (1e3, "milliseconds") if end < 1 else (1.0, "seconds")
    ranks = {a.stage: a.rank for a in timeline.actions}
    for kind, color, label in (("F", colors[0], "forward"), ("B", colors[1], "backward")):
        for chunk in range(timeline.num_chunks):
            bars = [a for a in shown if a.kind == kind and a.chunk == chunk]
            if bars:
                part = f", chunk {chunk}" if timeline.num_chunks > 1 else ""
                ax.add_patch(_bars(bars, scale, color, _strength(chunk, timeline.num_chunks), label + part, page, line))
    if _height_of_row(timeline) >= 0.2:
        for a in shown:
            text = str(a.micro)
            if (a.end_s - a.start_s) * inches_per_s >= _DIGIT_INCHES * (len(text) + 0.3):
                middle = scale * (a.start_s + a.end_s) / 2
                color = page if _strength(a.chunk, timeline.num_chunks) > 0.75 else ink
                ax.text(middle, a.stage, text, ha="center", va="center_baseline", color=color, fontsize=8, clip_on=True)
    ax.set_xlim(0, scale * end)
    ax.set_ylim(timeline.num_stages - 0.45, -0.55)
    if timeline.num_stages <= 32:
        ax.set_yticks(range(timeline.num_stages), [f"stage {stage} (rank {ranks[stage]})" for stage in range(timeline.num_stages)])
    else:
        ax.set_ylabel("stage")
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    measured, theory = timeline.bubble, timeline.bubble_theory
    title = f"Pipeline, step {timeline.step}: {100 * measured:.1f} % of the stages' time is idle, {100 * theory:.1f} % in theory"
    ax.set(title=title, xlabel=f"{unit} from the first forward")


def caption(timelines: Sequence[StepTimeline]) -> str:
    """What the drawing of the last of these shows."""
    last = timelines[-1]
    chunks = f", {last.num_chunks} chunks a stage" if last.num_chunks > 1 else ""
    said = [
        f"Schedule {last.schedule}: {last.num_stages} stages{chunks}, {last.num_micro} micro-batches; the numbers are those of the micro-batches. "
        "Theory is (p - 1) / (v m + p - 1), for stages of equal cost and messages that take no time."
    ]
    if last.clock_spread_s > 0:
        said.append(f"The stages are on several nodes, whose clocks are aligned to about {1e3 * last.clock_spread_s:.2g} ms.")
    if len(last.actions) > _DRAWN:
        said.append(f"The first {_DRAWN} of {len(last.actions)} actions are drawn.")
    if len(timelines) > 1:
        bubbles = [100 * t.bubble for t in timelines]
        said.append(f"Over the {len(timelines)} recorded steps the idle part was {min(bubbles):.1f} to {max(bubbles):.1f} %.")
    return " ".join(said)


def _height_of_row(timeline: StepTimeline) -> float:
    return (height_inches(timeline) - 1.6) / timeline.num_stages


def _strength(chunk: int, num_chunks: int) -> float:
    return 1.0 - 0.5 * chunk / max(1, num_chunks - 1)


def _bars(actions: Sequence[TimedAction], scale: float, color: str, alpha: float, label: str, edge: str, line: float) -> PathPatch:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    vertices: list[tuple[float, float]] = []
    codes: list[int] = []
    for a in actions:
        left, right = scale * a.start_s, scale * a.end_s
        top, bottom = a.stage - _BAR / 2, a.stage + _BAR / 2
        vertices += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        codes += [int(Path.MOVETO), *[int(Path.LINETO)] * 3, int(Path.CLOSEPOLY)]
    return PathPatch(Path(vertices, codes), facecolor=color, alpha=alpha, edgecolor=edge, lw=line, label=label)
