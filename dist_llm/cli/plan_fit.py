"""Fit a scaling law to finished runs: coefficients with intervals, the best model for a budget, what to run next.

Sources are CSV files with columns params,tokens,loss (and active, for mixtures of experts), run directories, and folders of them; of
a run directory the held-out loss at its end counts. Intervals hold all coefficients together in 98 % of repetitions or more.

examples:
  dist-llm plan fit ladder/ladder.csv --plot ladder/fit.png
  dist-llm plan fit ladder --hold-out 1 --flops 1e15
  dist-llm plan fit runs.csv --law kaplan --json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_llm.utils.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from dist_llm.planning.approaches import Frontier
    from dist_llm.planning.fit import Fit
    from dist_llm.planning.law_forms import Points

__all__ = ["add_arguments", "run"]

_NEXT_RUN = 3.0  # times the FLOPs of the largest run: what the advised one may cost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dist-llm plan fit``."""
    parser.add_argument("sources", nargs="+", type=Path, metavar="RUNS|CSV", help="CSV files, run directories, or folders of them")
    parser.add_argument(
        "--law",
        choices=["chinchilla", "kaplan", "moe"],
        default="chinchilla",
        help="E + A/N^alpha + B/D^beta (default); Kaplan's; or Chinchilla's with experts counted as N_active^(1-share) N_total^share",
    )
    parser.add_argument(
        "--flops", type=float, nargs="+", metavar="C", help="budgets to name the best model for (default: 10 times the largest run)"
    )
    parser.add_argument("--hold-out", type=int, default=0, metavar="K", help="leave the K largest sizes out of the fit and predict them")
    parser.add_argument(
        "--unique-tokens", type=float, metavar="U", help="tokens of the corpus: the best model when they have to be repeated"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the fit (.png, .svg or .pdf)")
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="bootstrap data sets (default 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the bootstrap (default 0)")
    parser.add_argument("--json", action="store_true", help='print {"E", "A", "B", "alpha", "beta", "interval", ...} on stdout')


def run(args: argparse.Namespace) -> int:
    """Run ``dist-llm plan fit``."""
    _check(args)
    from dist_llm.cli.plan_fit_text import fit_as_text
    from dist_llm.planning.fit import fit_law

    everything = _points(args.sources)
    points, held_out = _split(everything, args.hold_out)
    fit = fit_law(points, args.law, samples=args.samples, seed=args.seed)
    answer: dict[str, Any] = {
        "law": fit.law,
        **fit.coefficients,
        "interval": {name: list(bounds) for name, bounds in fit.interval.items()},
        "interval_level": {
            "joint": fit.level_joint,
            "each": fit.level_each,
            "method": "profile of the objective, cut-off by parametric bootstrap",
        },
        "open": list(fit.open_sides),
        "points": len(points),
        "rms_log_loss": fit.rms,
        "leave_one_out": _errors(fit),
    }
    other = "kaplan" if args.law == "chinchilla" else "chinchilla"
    answer["beside"] = {other: _beside(points, other)}
    frontiers = _frontiers(fit)
    answer["approaches"] = {name: _frontier(found) for name, found in frontiers.items()}
    budgets = args.flops or [10 * float(points.flops.max())]
    answer["optimal"] = [_optimal(fit, c) for c in budgets]
    answer["next_run"] = _next(fit, budgets[0])
    if args.unique_tokens is not None:
        answer["data_constrained"] = [_repeated(fit, c, args.unique_tokens) for c in budgets]
    if held_out is not None:
        answer["held_out"] = _held_out(fit, held_out)
    if args.plot is not None:
        from dist_llm.planning.law_plots import draw_fit

        draw_fit(fit, frontiers, args.plot, held_out)
        answer["plot"] = str(args.plot)
    print(json.dumps(answer, allow_nan=False) if args.json else fit_as_text(answer, fit))
    return ExitCode.DONE


def _check(args: argparse.Namespace) -> None:
    for c in args.flops or ():
        if not 0 < c < float("inf"):
            raise ConfigError(f"--flops {c:g} must be a positive number")
    if args.unique_tokens is not None and not 0 < args.unique_tokens < float("inf"):
        raise ConfigError(f"--unique-tokens {args.unique_tokens:g} must be a positive number")
    if args.unique_tokens is not None and args.law == "kaplan":
        raise ConfigError(
            "--unique-tokens needs Chinchilla's law, over whose terms the worth of repeated tokens was fitted; leave --law out"
        )
    if args.hold_out < 0:
        raise ConfigError(f"--hold-out {args.hold_out} must not be negative")
    if args.samples < 100:
        raise ConfigError(f"--samples {args.samples} must be at least 100: the far ends of the intervals are read from them")
    if args.plot is not None and args.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {args.plot} must end in .png, .svg or .pdf")


def _points(sources: list[Path]) -> Points:
    from dist_llm.cli.plan_runs import find_runs, run_point, split_sources
    from dist_llm.planning.points import join_points, make_points, read_points

    files, folders = split_sources(sources)
    parts = [read_points(path) for path in files]
    rows = []
    for run_dir in (found for folder in folders for found in find_runs(folder)):
        point = run_point(run_dir)
        if isinstance(point, str):
            print(f"{run_dir} is left out: {point}", file=sys.stderr)
        else:
            rows.append((str(run_dir), {"params": point.params, "tokens": point.tokens, "loss": point.loss}))
    if rows:
        parts.append(make_points(rows))
    if not parts:
        raise ConfigError("none of the runs has finished; there is nothing to fit")
    return join_points(parts)


def _split(points: Points, hold_out: int) -> tuple[Points, Points | None]:
    import numpy as np

    if hold_out == 0:
        return points, None
    sizes = np.unique(points.active)
    if hold_out >= len(sizes):
        raise ConfigError(f"--hold-out {hold_out} leaves none of {len(sizes)} sizes to fit; hold fewer out")
    large = points.active >= sizes[-hold_out]
    return points.take(~large), points.take(large)


def _beside(points: Points, law: str) -> dict[str, Any]:
    from dist_llm.planning.fit import fit_quality

    try:
        return fit_quality(points, law)
    except ConfigError as error:  # one coefficient more than the law that was asked for, and no point more
        return {"reason": str(error)}


def _errors(fit: Fit) -> dict[str, float]:
    import numpy as np

    relative = np.abs(np.expm1(fit.left_out))
    return {
        "rms_log_loss": float(np.sqrt(np.mean(fit.left_out**2))),
        "median_rel_err": float(np.median(relative)),
        "worst_rel_err": float(relative.max()),
    }


def _frontiers(fit: Fit) -> dict[str, Frontier | str]:
    import numpy as np

    from dist_llm.planning.approaches import envelope, isoflop, with_noise

    noise = float(np.sqrt(np.mean(fit.left_out**2)))
    return {"minimum_over_curves": with_noise(envelope, fit.points, noise), "isoflop": with_noise(isoflop, fit.points, noise)}


def _frontier(found: Frontier | str) -> dict[str, Any]:
    if isinstance(found, str):
        return {"reason": found}
    interval = list(found.exponent_interval) if found.exponent_interval else None
    return {"exponent": found.law.exponent, "coefficient": found.law.coefficient, "exponent_interval": interval}


def _optimal(fit: Fit, flops: float) -> dict[str, Any]:
    try:
        found = fit.optimal(flops)
    except ValueError as error:
        return {"flops": flops, "reason": str(error)}
    best = found.best
    return {
        "flops": flops,
        "params": best.params,
        "tokens": best.tokens,
        "loss": best.loss,
        "interval": {"params": list(found.params), "tokens": list(found.tokens), "loss": list(found.loss), "level": 0.95},
    }


def _next(fit: Fit, target: float) -> dict[str, Any]:
    try:
        advice = fit.next_run(target, _NEXT_RUN * float(fit.points.flops.max()))
    except ValueError as error:
        return {"reason": str(error)}
    return {
        "params": advice.params,
        "tokens": advice.tokens,
        "flops": advice.flops,
        "loss": advice.loss,
        "target_flops": target,
        "target_error_now": advice.error_now,
        "target_error_then": advice.error_then,
    }


def _repeated(fit: Fit, flops: float, unique: float) -> dict[str, Any]:
    from dist_llm.planning.laws import ChinchillaLaw
    from dist_llm.planning.repetition import DataConstrainedLaw

    base = fit.curve()
    assert isinstance(base, ChinchillaLaw)
    try:
        best = DataConstrainedLaw(base, unique).optimal(flops)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        return {"flops": flops, "unique_tokens": unique, "reason": str(error)}
    return {
        "flops": flops,
        "unique_tokens": unique,
        "params": best.params,
        "tokens": best.tokens,
        "loss": best.loss,
        "passes": best.tokens / unique,
    }


def _held_out(fit: Fit, points: Points) -> list[dict[str, float]]:
    predicted = fit.predict(points.params, points.tokens, points.active)
    low, high = fit.band(points.params, points.tokens, active=points.active)
    return [
        {
            "params": float(n),
            "tokens": float(d),
            "measured": float(loss),
            "predicted": float(p),
            "low": float(a),
            "high": float(b),
            "rel_err": float(p / loss - 1),
        }
        for n, d, loss, p, a, b in zip(points.params, points.tokens, points.loss, predicted, low, high, strict=True)
    ]
