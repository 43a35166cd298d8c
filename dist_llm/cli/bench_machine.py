"""``bench machine``: its arguments and its answer."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dist-llm bench machine``."""
    parser.add_argument(
        "--ranks", type=int, default=None, metavar="N", help="ranks that work at once (default: 2 on CPU, where there are 2 cores)"
    )
    parser.add_argument("--seconds", type=float, default=0.15, metavar="S", help="time for each size of each measurement (default 0.15)")
    parser.add_argument("--out", metavar="FILE", default="machine.yaml", help="cluster description to write (default machine.yaml)")


def run(arguments: argparse.Namespace) -> int:
    """Run ``dist-llm bench machine``."""
    from dist_llm.engine.ranks import read_launch
    from dist_llm.utils.errors import ConfigError, ExitCode

    if arguments.ranks is not None and arguments.ranks < 1:
        raise ConfigError(f"--ranks {arguments.ranks} must be at least 1")
    if not 0 < arguments.seconds <= 10:
        raise ConfigError(f"--seconds {arguments.seconds} must be above 0 and at most 10")
    out = Path(arguments.out)
    if out.suffix not in (".yaml", ".yml") or not out.parent.is_dir():
        # `plan --cluster` tells a path from a name by this suffix.
        raise ConfigError(f"--out {out} must end in .yaml and lie in a directory that exists")
    launch = read_launch()
    if launch.world_size > 1 and arguments.ranks is not None:
        raise ConfigError(
            f"--ranks {arguments.ranks}: {launch.launcher} has started {launch.world_size} ranks, which are measured; leave it out"
        )
    if launch.world_size != launch.local_size:
        raise ConfigError(
            f"{launch.launcher} started {launch.world_size} ranks, {launch.local_size} of them on this machine; start ranks on one machine only"
        )

    from dist_llm.bench.machine import machine_as_text, measure_machine
    from dist_llm.bench.machine_file import write_machine

    answer = measure_machine(launch, ranks=arguments.ranks, seconds=arguments.seconds)
    if not launch.is_main:
        return ExitCode.DONE
    write_machine(out, answer)
    print(json.dumps(answer) if arguments.json else machine_as_text(answer))
    print(f"{out} written; ask about it with `dist-llm plan --gpus {answer['ranks']}x{out} ...`", file=sys.stderr)
    return ExitCode.DONE
