"""Predicted against published throughput, drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dist_llm.planning.accuracy import accuracy_of
from dist_llm.planning.calibrate import Prediction

__all__ = ["draw_scatter"]

_COLOURS = {"volta": "#7b4fa3", "ampere": "#2166ac", "hopper": "#c2570c", "blackwell": "#2d7f5e"}
_MARKERS = {"volta": "D", "ampere": "o", "hopper": "^", "blackwell": "s"}


def draw_scatter(predictions: Sequence[Prediction], path: Path) -> None:
    """Write a scatter plot of model speed, 6 x weights' FLOPs a token, predicted against measured, on logarithmic axes.

    One measure for all units: TFLOP/s a device of 6 FLOPs a weight and token, recomputation and attention not counted.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    accuracy = accuracy_of(predictions)
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        groups[prediction.run.cluster.generation].append(prediction)
    figure, axes = pyplot.subplots(figsize=(6.4, 6.0), dpi=150)
    everything = [rate for p in predictions for rate in (_rate(p, p.seconds), _rate(p, p.run.measured_s))]
    low, high = 0.7 * min(everything), 1.4 * max(everything)
    axes.fill_between(
        [low, high], [low / 1.25, high / 1.25], [low * 1.25, high * 1.25], color="#d8dee4", alpha=0.6, linewidth=0, label="within 25 %"
    )
    axes.plot([low, high], [low, high], color="#24292f", linewidth=0.8)
    for generation, group in sorted(groups.items()):
        axes.scatter(
            [_rate(p, p.run.measured_s) for p in group], [_rate(p, p.seconds) for p in group], s=16, alpha=0.7, linewidths=0,
            marker=_MARKERS.get(generation, "x"), color=_COLOURS.get(generation, "#6e7781"), label=f"{generation} ({len(group)} runs)",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_xlabel("published, TFLOP/s a device (6 a weight and token)")
    axes.set_ylabel("predicted")
    axes.set_title(
        f"{accuracy.rows} published runs: median error {100 * accuracy.median:.1f} %, 90th percentile {100 * accuracy.p90:.1f} %",
        fontsize=10, loc="left",
    )  # fmt: skip
    axes.grid(color="#d8dee4", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _rate(prediction: Prediction, seconds: float) -> float:
    run = prediction.run
    tokens = run.layout.global_batch * run.model.seq_len
    return run.weight_flops_per_token * tokens / run.layout.ranks / seconds / 1e12
