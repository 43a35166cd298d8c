"""``bench coord-check``: its arguments and its answer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

__all__ = ["add_arguments", "run"]

_FORMATS = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dist-llm bench coord-check``."""
    parser.add_argument("config", help="YAML file, see docs/config.md; its shape, rate and initial deviation are used, not its data")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="values that win over the file, right behind it")
    parser.add_argument("--widths", metavar="D,D,...", help="values of d_model (default: four, doubling, that the config's heads allow)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="optimiser steps before measuring (default 5)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="initialisations to average over (default 3)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--plot", metavar="FILE", help="draw it: png, svg or pdf")


def run(arguments: argparse.Namespace) -> int:
    """Run ``dist-llm bench coord-check``; exit code 1 when something under muP is not flat."""
    from dist_llm.config.load import load_config
    from dist_llm.utils.errors import ConfigError, ExitCode

    for option in ("steps", "seeds", "threads"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} {value} must be at least 1")
    plot = Path(arguments.plot) if arguments.plot else None
    if plot is not None and (plot.suffix not in _FORMATS or not plot.parent.is_dir()):
        raise ConfigError(f"--plot {plot} must end in {', '.join(_FORMATS)} and lie in a directory that exists")
    named = None if arguments.widths is None else _widths(arguments.widths)
    config = load_config(arguments.config, arguments.overrides).config

    from dist_llm.bench.coord_check import check_coordinates, coordinates_as_text, default_widths

    widths = named or default_widths(config.model)
    answer = check_coordinates(config, widths=widths, steps=arguments.steps, seeds=arguments.seeds, threads=arguments.threads)
    if plot is not None:
        from dist_llm.bench.coord_plot import draw_coordinates

        draw_coordinates(answer, plot)
    print(json.dumps(answer) if arguments.json else coordinates_as_text(answer))
    return ExitCode.DONE if answer["ok"] else ExitCode.CHECK_FAILED


def _widths(text: str) -> list[int]:
    from dist_llm.utils.errors import ConfigError

    try:
        widths = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise ConfigError(f"--widths {text} must be whole numbers with commas between them, such as 32,64,128") from None
    if len(widths) < 2 or widths[0] < 1:
        raise ConfigError(f"--widths {text} must name at least two different widths, each at least 1: a slope needs two points")
    return widths
