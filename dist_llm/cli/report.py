"""Draw a run, finished or not, as one self-contained HTML file, and print where it is.

The figures are also written as plots/*.png in the run directory. The page needs no network and can be sent as it is.

examples:
  dist-llm report runs/quickstart
  dist-llm report runs/quickstart --out quickstart.html
  dist-llm report runs/quickstart --json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from dist_llm.utils.errors import ExitCode

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``dist-llm report`` takes."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where the page goes; default report.html in the run directory")
    parser.add_argument(
        "--json",
        action="store_true",
        help='print {"report", "steps", "final_loss", "eval_bits_per_byte"} on stdout; unknown numbers are null',
    )


def run(args: argparse.Namespace) -> int:
    """Draw the report and say where it is."""
    from dist_llm.report.html import draw_report
    from dist_llm.report.run import load_run, summary

    data = load_run(args.run)
    path = draw_report(data, args.out)
    if args.json:
        # A loss that is not a number has no JSON number either; it is written as in metrics.jsonl.
        said = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary(data).items()}
        print(json.dumps({"report": str(path), **said}))
    else:
        print(path)
    return ExitCode.DONE
