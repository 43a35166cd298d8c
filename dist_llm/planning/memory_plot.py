"""Memory bars: what fills a device, by pipeline stage or by layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dist_llm.planning.rank_memory import RankBytes

__all__ = ["draw_memory"]

# Bottom to top, with colours that stay apart in grey and for colour-blind readers (Okabe and Ito's set, and two greys).
_PARTS = (
    ("parameters", "parameters", "#0072B2"),
    ("masters", "master copies", "#56B4E9"),
    ("optimizer", "moments", "#009E73"),
    ("gradients", "gradients", "#F0E442"),
    ("activations", "activations", "#D55E00"),
    ("logits", "logits", "#E69F00"),
    ("buffers", "buffers", "#CC79A7"),
    ("slack", "context and allocator", "#999999"),
)
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def draw_memory(bars: Mapping[str, RankBytes], path: str | Path, *, limit_bytes: float | None = None, title: str = "") -> None:
    """Write a picture with one stacked bar for each of ``bars``.

    Args:
        bars: label, such as "stage 0", to bytes of a rank.
        path: of the picture; its ending says the format.
        limit_bytes: memory of the device, drawn as a line.
        title: above the picture.

    Raises:
        ValueError: no bars.
    """
    if not bars:
        raise ValueError("draw_memory needs at least one bar, got none")
    from matplotlib.figure import Figure  # takes half a second: not for who does not draw

    totals = [rank.total for rank in bars.values()]
    highest = max([*totals, limit_bytes or 0])
    scale, unit = next((pair for pair in _UNITS if highest >= pair[0]), _UNITS[-1])
    figure = Figure(figsize=(max(5.0, 2.6 + 0.75 * len(bars)), 4.2), layout="constrained")
    axes = figure.subplots()
    bottoms = [0.0] * len(bars)
    for name, label, colour in _PARTS:
        heights = [getattr(rank, name) / scale for rank in bars.values()]
        axes.bar(range(len(bars)), heights, 0.7, bottom=bottoms, label=label, color=colour, edgecolor="white", linewidth=0.4)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for x, total in enumerate(totals):
        axes.annotate(f"{total / scale:.3g}", (x, total / scale), ha="center", va="bottom", fontsize=8)
    if limit_bytes is not None:
        axes.axhline(limit_bytes / scale, color="black", linewidth=1, linestyle="--", label=f"device, {limit_bytes / scale:.3g} {unit}")
    axes.set_xticks(range(len(bars)), list(bars), rotation=45 if len(bars) > 8 or max(map(len, bars)) > 12 else 0)
    axes.set_ylabel(f"{unit} on one rank")
    axes.set_ylim(0, highest / scale * 1.08)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
