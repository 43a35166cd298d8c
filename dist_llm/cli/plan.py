"""Plan a run before a GPU is asked for: what to train, what fits, how fast.

dist-llm plan --gpus 64xH100-80G --days 14                              the best model for devices and time, its layouts, what they cost
dist-llm plan --model CONFIG --tokens 300B --gpus 64xH100-80G           the layouts of a given model; --write DIR: the config and the sbatch file
dist-llm plan --flops 1e22 --moe 8x2                                    a mixture of experts for that compute, on 1 to 16,384 devices
dist-llm plan predict runs.csv --json                                   step times of published runs from the planner's model, beside the measured ones
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys

from dist_llm.utils.errors import ExitCode

__all__ = ["add_arguments", "run"]

# sub-verb: (what it does, module). A module offers `add_arguments(parser)` and `run(args) -> int`, as a verb does.
SUBVERBS = {
    "predict": ("predict published runs and compare with what was measured", "dist_llm.cli.plan_predict"),
    "fit": ("fit scaling laws to runs", "dist_llm.cli.plan_fit"),
    "ladder": ("write a ladder of small runs, or read its results back", "dist_llm.cli.plan_ladder"),
}
SEARCH = "dist_llm.cli.plan_search"  # `dist-llm plan --gpus ...`, without a sub-verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dist-llm plan`` and of its sub-verbs.

    Each module declares its own arguments and imports what is heavy only when it runs.
    """
    parsers = parser.add_subparsers(dest="subverb", metavar="SUBVERB")
    for name, (text, module_name) in SUBVERBS.items():
        if importlib.util.find_spec(module_name) is None:
            continue
        module = importlib.import_module(module_name)
        module.add_arguments(
            parsers.add_parser(name, help=text, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        )
    if importlib.util.find_spec(SEARCH) is not None:
        importlib.import_module(SEARCH).add_arguments(parser)
    parser.set_defaults(plan_parser=parser)


def run(args: argparse.Namespace) -> int:
    """Run the sub-verb, or the search where there is none."""
    name = args.subverb
    if name is not None:
        return int(importlib.import_module(SUBVERBS[name][1]).run(args))
    if importlib.util.find_spec(SEARCH) is not None:
        return int(importlib.import_module(SEARCH).run(args))
    args.plan_parser.print_usage(sys.stderr)
    print("dist-llm plan: say what to plan; `dist-llm plan --help` lists the sub-verbs", file=sys.stderr)
    return ExitCode.USAGE
