"""Predict the step time of published training runs from public hardware figures, and compare with what was measured.

Each hardware generation has one calibration constant, fitted on the rows of other sources than the row's own where there are any.
Rows marked [doubtful] and rows that cannot be filled in are skipped, with the reason. docs/planning/predict.md explains the model.

examples:
  dist-llm plan predict tests/data/published_runs.csv
  dist-llm plan predict runs.csv --json --plot runs.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dist_llm.utils.errors import DataError, ExitCode, StorageError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``dist-llm plan predict`` takes."""
    parser.add_argument("csv", metavar="CSV", help="table of runs, with the columns of tests/data/published_runs.csv")
    parser.add_argument(
        "--json",
        action="store_true",
        help='print {"rows": [{"id", "predicted", "measured", "unit", "rel_err"}], "skipped": [{"id", "reason"}], "summary"} on stdout',
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw predicted against measured (png, svg or pdf)")


def run(args: argparse.Namespace) -> int:
    """Predict every row of the table."""
    from dist_llm.planning.accuracy import accuracy_of
    from dist_llm.planning.calibrate import predict_runs
    from dist_llm.planning.published import Run, SkipRow, parse_row, read_rows

    if args.plot is not None and args.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise DataError(f"--plot {args.plot}: the name must end in .png, .svg or .pdf")
    runs: list[Run] = []
    skipped: list[dict[str, str]] = []
    for row in read_rows(args.csv):
        try:
            runs.append(parse_row(row))
        except SkipRow as reason:
            skipped.append({"id": row.get("id", ""), "reason": str(reason)})
    predictions = predict_runs(runs)
    rows = [
        {"id": p.run.id, "predicted": p.predicted, "measured": p.run.measured, "unit": p.run.unit, "rel_err": p.rel_err}
        for p in predictions
    ]
    accuracy = accuracy_of(predictions) if predictions else None
    if args.plot is not None:
        if accuracy is None:
            raise DataError(f"{args.csv}: no row can be predicted, so there is nothing to draw; --json gives the reason for each")
        from dist_llm.planning.scatter import draw_scatter

        try:
            draw_scatter(predictions, args.plot)
        except OSError as error:
            raise StorageError(f"cannot write {args.plot}: {error.strerror or error}") from None
        print(f"drew {args.plot}", file=sys.stderr)
    summary = None
    if accuracy is not None:
        order = accuracy.order if accuracy.pairs else None
        summary = {"median": accuracy.median, "p90": accuracy.p90, "worst": accuracy.worst, "pairs": accuracy.pairs, "order": order}
    if args.json:
        print(json.dumps({"rows": rows, "skipped": skipped, "summary": summary}))
        return ExitCode.DONE
    width = max((len(p.run.id) for p in predictions), default=2)
    for p in predictions:
        print(
            f"{p.run.id:<{width}}  predicted {p.predicted:>10.4g}  measured {p.run.measured:>10.4g} {p.run.unit:<13} {100 * p.rel_err:+6.1f} %"
        )
    for entry in skipped:
        print(f"skipped {entry['id']}: {entry['reason']}")
    if accuracy is not None:
        ordered = f"{100 * accuracy.order:.0f} % of {accuracy.pairs} pairs of layouts in the right order" if accuracy.pairs else "no sweeps"
        print(
            f"{accuracy.rows} rows: median error {100 * accuracy.median:.1f} %, 90th percentile {100 * accuracy.p90:.1f} %, "
            f"worst {100 * accuracy.worst:.0f} %; {ordered}"
        )
    return ExitCode.DONE
