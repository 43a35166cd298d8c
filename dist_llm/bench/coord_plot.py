"""The coordinate check drawn: size of activations and of their change against width, standard parametrisation beside muP."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from dist_llm.utils.files import write_atomic

__all__ = ["draw_coordinates"]

_KINDS = {
    "embedding": "#6e7781",
    "scores": "#7b4fa3",
    "attention": "#2166ac",
    "mlp": "#2d7f5e",
    "final hidden": "#24292f",
    "logits": "#c2570c",
}
_LINES = ("-", "--", ":")  # first, middle, last block


def draw_coordinates(answer: dict[str, Any], path: Path) -> None:
    """Write the answer of ``coord_check.check_coordinates`` as four log-log panels, all rows on one scale.

    The kind of file follows the suffix of ``path``: png, svg or pdf.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = {"standard": "standard parametrisation", "mup": f"muP, base width {answer['base_width']}"}
    rows = {"size": f"mean |x| after {answer['steps']} steps", "change": "mean |change| since initialisation"}
    figure, axes = pyplot.subplots(2, 2, figsize=(8.4, 7.2), dpi=150, sharex=True, sharey="row")
    for i, (what, y_label) in enumerate(rows.items()):
        for j, (name, title) in enumerate(columns.items()):
            panel = axes[i][j]
            lines: dict[str, int] = {}
            for part in answer["parts"]:
                kind = part.rsplit(" ", 1)[0] if part.rsplit(" ", 1)[-1].isdigit() else part
                style = _LINES[lines.get(kind, 0)]
                lines[kind] = lines.get(kind, 0) + 1
                label = f"{part}: {answer[name]['slopes'][what][part]:+.2f}"
                panel.plot(
                    answer["widths"],
                    answer[name][what][part],
                    style,
                    color=_KINDS[kind],
                    marker="o",
                    markersize=3,
                    linewidth=1.3,
                    label=label,
                )
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(answer["widths"], [str(width) for width in answer["widths"]])
            panel.minorticks_off()
            panel.grid(color="#d8dee4", linewidth=0.5)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
            if i == 0:
                panel.set_title(title, fontsize=10, loc="left", fontweight="bold")
            if j == 0:
                panel.set_ylabel(y_label)
            panel.set_xlabel("width (d_model)" if i == 1 else "")
            panel.legend(fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="slope", title_fontsize=7)
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix(".") or "png")
    pyplot.close(figure)
    write_atomic(path, image.getvalue())
