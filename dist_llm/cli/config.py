"""Show, validate and describe configs.

  dist-llm config show configs/tiny/llama.yaml optim.lr=1e-3
  dist-llm config validate configs/tiny/llama.yaml --ranks 4
  dist-llm config schema > config.schema.json

A config is YAML; `extends: other.yaml` puts it over other files, and a.b=c on the command line over all of them.
Every key is described in docs/config.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from dist_llm.utils.errors import ExitCode

__all__ = ["add_arguments", "run"]


class _OverridesAnywhere(argparse.ArgumentParser):
    """Takes ``CONFIG --ranks 2 a.b=c`` as well as ``CONFIG a.b=c --ranks 2``.

    argparse gives all positional arguments their values at the first of them, and calls later ones unrecognised.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        parsed, extras = super().parse_known_args(args, namespace)
        if "overrides" in parsed:
            parsed.overrides = [*parsed.overrides, *(extra for extra in extras if not extra.startswith("-"))]
            extras = [extra for extra in extras if extra.startswith("-")]
        return parsed, extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-verbs and what they take."""
    parser.set_defaults(action=None, usage=parser.format_usage)
    actions = parser.add_subparsers(dest="action", metavar="{show,validate,schema}", parser_class=_OverridesAnywhere)
    show = actions.add_parser(
        "show",
        help="print the resolved config, the origin of each value as a comment",
        description="Print the resolved config as YAML that loads again; a comment says where each value came from.",
    )
    _add_config(show)
    show.add_argument("--json", action="store_true", help="print one JSON object: config, origins, files, hash")
    validate = actions.add_parser(
        "validate",
        help="name everything wrong with a config",
        description="Check a config. Exit code 0 if it is valid, 2 with every problem (file, line, key, nearest key) if it is not.",
    )
    _add_config(validate)
    validate.add_argument("--ranks", type=int, metavar="N", help="check as well that the config fits N ranks")
    validate.add_argument("--json", action="store_true", help="print one JSON object: ok, problems")
    actions.add_parser("schema", help="print the JSON schema", description="Print the JSON schema of config files, for editors.")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="value that wins over every file, such as optim.lr=3e-4")


def run(args: argparse.Namespace) -> int:
    """Carry out one sub-verb."""
    if args.action == "show":
        return _show(args)
    if args.action == "validate":
        return _validate(args)
    if args.action == "schema":
        return _schema()
    print(args.usage() + "dist-llm config: name one of show, validate, schema; `dist-llm config --help` explains them", file=sys.stderr)
    return ExitCode.USAGE


def _show(args: argparse.Namespace) -> int:
    from dist_llm.config.load import config_hash, dump_yaml, load_config

    resolved = load_config(args.config, args.overrides)
    if args.json:
        _print_json(
            {
                "config": resolved.config.model_dump(mode="json"),
                "origins": resolved.origins,
                "files": [str(file) for file in resolved.files],
                "hash": config_hash(resolved.config),
            }
        )
    else:
        print(dump_yaml(resolved.config, resolved.origins), end="")
    return ExitCode.DONE


def _validate(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from dist_llm.config.load import ConfigErrors, Problem, load_config

    if args.ranks is not None and args.ranks < 1:
        print(f"dist-llm config: --ranks: {args.ranks} must be at least 1", file=sys.stderr)
        return ExitCode.USAGE
    problems: tuple[Problem, ...] = ()
    try:
        load_config(args.config, args.overrides, ranks=args.ranks)
    except ConfigErrors as errors:
        problems = errors.problems
    if args.json:
        _print_json({"ok": not problems, "problems": [asdict(problem) for problem in problems]})
    elif problems:
        # Each line begins with its file and line, so that an editor can jump there.
        print(*problems, sep="\n", file=sys.stderr)
    else:
        print(f"{args.config}: valid" + (f" on {args.ranks} ranks" if args.ranks is not None else ""))
    return ExitCode.USAGE if problems else ExitCode.DONE


def _schema() -> int:
    from dist_llm.config.describe import json_schema

    _print_json(json_schema())
    return ExitCode.DONE


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))
