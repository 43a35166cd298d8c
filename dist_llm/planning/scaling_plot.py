"""Strong and weak scaling of a model to 16,384 devices, drawn: how much of the peak is left when the devices grow."""

from __future__ import annotations

from pathlib import Path

from dist_llm.planning.answer import costs_of
from dist_llm.planning.cluster import Cluster
from dist_llm.planning.growth import over_counts
from dist_llm.planning.saving import AUTO, Kernels
from dist_llm.planning.search import Plan
from dist_llm.planning.shapes import ModelShape

__all__ = ["draw_scaling", "scaling_curves"]

_KINDS = {"strong": ("#2166ac", "o"), "weak": ("#c2570c", "s")}


def scaling_curves(
    model: ModelShape,
    cluster: Cluster,
    batch_size: int,
    *,
    precision: str = "bf16",
    limit_bytes: float | None = None,
    kernels: Kernels = AUTO,
    most: int = 16384,
) -> dict[str, list[tuple[int, Plan]]]:
    """Fastest plans by number of devices: "strong" with ``batch_size`` rows a step throughout, "weak" with two rows a device."""
    curves = {}
    for kind, rows in (("strong", batch_size), ("weak", 2)):
        counts = over_counts(
            model, cluster, rows, precision=precision, limit_bytes=limit_bytes, kernels=kernels, most=most, weak=kind == "weak"
        )
        curves[kind] = [(gpus, plan) for gpus, plan in counts if plan is not None]
    return curves


def draw_scaling(
    model: ModelShape,
    cluster: Cluster,
    batch_size: int,
    path: Path,
    *,
    precision: str = "bf16",
    limit_bytes: float | None = None,
    kernels: Kernels = AUTO,
) -> None:
    """Write the curves to ``path``: tokens a second above, share of the peak below, with the interval of published runs.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = scaling_curves(model, cluster, batch_size, precision=precision, limit_bytes=limit_bytes, kernels=kernels)
    figure, (speed, share) = pyplot.subplots(2, 1, figsize=(7.0, 7.2), dpi=150, sharex=True)
    for kind, points in curves.items():
        if not points:
            continue
        colour, marker = _KINDS[kind]
        gpus = [count for count, _ in points]
        costs = [costs_of(plan, model, cluster, 1.0, 24.0) for _, plan in points]
        rates = [c.tokens_per_s for c in costs]
        label = f"strong: {batch_size:,} rows a step" if kind == "strong" else "weak: 2 rows a device"
        speed.plot(gpus, rates, marker=marker, markersize=4, color=colour, linewidth=1.4, label=label)
        faster = [plan.step.total_s / plan.step.low_s for _, plan in points]
        slower = [plan.step.total_s / plan.step.high_s for _, plan in points]
        shares = [100 * c.mfu for c in costs]
        share.plot(gpus, shares, marker=marker, markersize=4, color=colour, linewidth=1.4, label=label)
        share.fill_between(
            gpus, [m * s for m, s in zip(shares, slower, strict=True)], [m * f for m, f in zip(shares, faster, strict=True)],
            color=colour, alpha=0.12, linewidth=0,
        )  # fmt: skip
    rates_by_count = [(n, costs_of(plan, model, cluster, 1.0, 24.0).tokens_per_s) for points in curves.values() for n, plan in points]
    ends = [1, 16384]
    if rates_by_count:
        best = max(rate / n for n, rate in rates_by_count)
        ends = [min(n for n, _ in rates_by_count), max(n for n, _ in rates_by_count)]
        speed.plot(
            ends, [best * n for n in ends], color="#8c959f", linewidth=0.9, linestyle="--", label="every device as fast as the fastest"
        )
    share.set_xlim(ends[0] / 1.3, ends[1] * 1.3)
    speed.set(xscale="log", yscale="log", ylabel="tokens a second")
    share.set(xscale="log", ylabel="MFU, % (shaded: nine of ten published runs)", xlabel=f"number of {cluster.device}", ylim=(0, None))
    ticks = [n for n in (1, 4, 16, 64, 256, 1024, 4096, 16384) if ends[0] <= n <= ends[1]]
    share.set_xticks(ticks, labels=[f"{n:,}" for n in ticks])
    share.minorticks_off()
    for axes in (speed, share):
        axes.grid(color="#d8dee4", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    speed.legend(frameon=False, fontsize=9, loc="upper left")
    speed.set_title(
        f"Fastest layout on each number of devices: {model.num_layers} layers of {model.d_model}, rows of {model.seq_len:,}",
        fontsize=10,
        loc="left",
    )
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
