"""Prove that parallel layouts compute what one process computes.

Shrinks the config (widths, layers, vocabulary; its structure stays), trains the small model for three steps in one plain process
and at each layout on CPU ranks of this machine, and compares loss, gradient norm, every parameter's gradient and the weights
(docs/verify.md says how, and what it does not prove):

  dist-llm verify CONFIG                          the config's own layout and the standard list
  dist-llm verify CONFIG --layout tp2-pp2 --layout zero3-dp4
  dist-llm verify CONFIG --bf16                   the same in bf16: how far rounding spreads

A layout's name is made of tpN, sp, ppN, interleavedN, cpN with ring or a2a, zeroN, dpN, recompute-selective, recompute-full, mbN.
Writes certificate.json. Exit code 0 when all layouts agree, 1 when one does not (what differs first is named), 2 when a layout
that was named cannot be had with this config.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dist-llm verify``."""
    parser.add_argument("config", help="YAML file, see docs/config.md")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="values that win over the file")
    parser.add_argument("--layout", action="append", default=[], metavar="NAME", help="compare only this one; may be given again")
    parser.add_argument("--bf16", action="store_true", help="compare in bf16 instead of fp32, with a wide tolerance")
    parser.add_argument(
        "--tolerance", type=float, metavar="X", help="largest relative error that counts as the same (default 1e-5; bf16 0.1)"
    )
    parser.add_argument("--out", metavar="FILE", default="certificate.json", help="where the certificate goes (default certificate.json)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Run ``dist-llm verify``."""
    from dist_llm.config.load import load_config
    from dist_llm.topology.layout import STANDARD, parse_layout
    from dist_llm.utils.errors import ConfigError, ExitCode, StorageError

    if arguments.tolerance is not None and not arguments.tolerance > 0:
        raise ConfigError(f"--tolerance {arguments.tolerance} must be more than 0")
    config = load_config(arguments.config, arguments.overrides).config
    named = [parse_layout(text) for text in arguments.layout]
    path = Path(arguments.out)
    if path.is_dir() or not path.absolute().parent.is_dir():  # said now, not when the work is done
        what = "is a directory" if path.is_dir() else f"is in {path.parent}, which is no directory"
        raise StorageError(f"cannot write the certificate: --out {path} {what}; name a file in a directory that exists")

    from dist_llm.verify.certificate import HEADER, as_dict, outcome_lines, summary_lines, write_certificate
    from dist_llm.verify.run import TOLERANCES, Outcome, verify_layouts
    from dist_llm.verify.shrink import MAX_RANKS, own_layout, shrink

    own = own_layout(config)
    small = shrink(config, named)
    if arguments.bf16:
        small = small.model_copy(update={"precision": "bf16"})
    tolerance = arguments.tolerance if arguments.tolerance is not None else TOLERANCES[small.precision]
    out = sys.stderr if arguments.json else sys.stdout
    print(
        f"{config.name}: {small.model.num_layers} layers of {small.model.d_model}, rows of {small.data.seq_len}, {small.precision}",
        file=out,
    )
    asked = config.parallel
    if not named and (asked.tp, asked.cp, asked.pp, asked.dp or own.dp, asked.chunks) != (own.tp, own.cp, own.pp, own.dp, own.chunks):
        print(f"its own layout, brought down to {MAX_RANKS} ranks of this machine at most, is compared as {own}", file=out)
    print(HEADER, file=out, flush=True)

    def show(outcome: Outcome) -> None:
        print(outcome_lines(outcome, tolerance), file=out, flush=True)

    start = time.perf_counter()
    result = verify_layouts(small, named or [own, *STANDARD], tolerance=tolerance, on_outcome=show)
    seconds = time.perf_counter() - start
    write_certificate(path, result, config, seconds=seconds)
    print(summary_lines(result), file=out)
    print(f"{arguments.out} written after {seconds:.0f} s", file=out)
    if arguments.json:
        print(json.dumps(as_dict(result)))
    if not all(outcome.holds(tolerance) for outcome in result.outcomes):
        return ExitCode.CHECK_FAILED
    return ExitCode.USAGE if named and result.refused else ExitCode.DONE
