"""``bench CASE`` of single kernels, and ``bench --all``: arguments and answers."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

__all__ = ["add_all_arguments", "add_arguments", "misplaced", "run", "run_all"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of a kernel's case."""
    _common(parser)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME", help="race only this peer (eager, compile, ...); may be repeated"
    )
    parser.add_argument("--times-only", action="store_true", help="no errors against float64 and no yardsticks, which take the most time")
    parser.add_argument("--json", action="store_true", help="answer with one JSON object on stdout")


def add_all_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``bench --all``, which has no case to put them behind; their names in the namespace begin with ``all_``."""
    parser.add_argument("--all", action="store_true", help="race every kernel and write the table of docs/benchmarks/kernels.md")
    _common(parser, prefix="all_")
    parser.add_argument("--out", dest="all_out", metavar="FILE", help="write the table to FILE instead of stdout")


def _common(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    # None instead of the default: an option of `bench --all` that stands before a case can then be told from one that was not given.
    parser.add_argument("--threads", dest=f"{prefix}threads", type=int, default=None, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument(
        "--rounds",
        dest=f"{prefix}rounds",
        type=int,
        default=None,
        metavar="N",
        help="interleaved rounds; medians are reported (default 9, fewer where one takes seconds)",
    )
    parser.add_argument(
        "--malloc", dest=f"{prefix}malloc", choices=["tuned", "default", "both"], default=None,
        help="glibc's allocator: tuned as `train` sets it (default), as it comes, or one after the other, the second with at most 3 rounds and times only",
    )  # fmt: skip
    parser.add_argument("--device", dest=f"{prefix}device", choices=["cpu", "cuda"], default=None, help="default: a GPU where there is one")


def _say(line: str) -> None:
    from dist_llm.bench.kernels.run import PROGRESS

    print(f"{PROGRESS}{line}", file=sys.stderr, flush=True)


def _device(requested: str | None, threads: int | None, rounds: int | None) -> Any:
    import torch

    from dist_llm.utils.errors import ConfigError

    for option, value in (("threads", threads), ("rounds", rounds)):
        if value is not None and value < 1:
            raise ConfigError(f"--{option} {value} must be at least 1")
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; leave --device out to race on the CPU")
    return torch.device("cuda" if requested != "cpu" and torch.cuda.is_available() else "cpu")


def misplaced(arguments: argparse.Namespace) -> str | None:
    """An option of ``bench --all`` that was given before a case."""
    return next((name for name in ("threads", "rounds", "malloc", "device", "out") if getattr(arguments, f"all_{name}") is not None), None)


def run(arguments: argparse.Namespace) -> int:
    """Run ``dist-llm bench CASE`` of a kernel; exit code 1 when ours is less accurate than the best peer."""
    from dist_llm.bench.answer import encode
    from dist_llm.bench.kernels.run import case_as_text, run_case
    from dist_llm.utils.errors import ExitCode

    rounds, malloc = arguments.rounds, arguments.malloc or "tuned"
    device = _device(arguments.device, arguments.threads, rounds)
    answer = run_case(
        arguments.case,
        device,
        threads=arguments.threads,
        rounds=rounds,
        malloc=malloc,
        only=arguments.peer,
        times_only=arguments.times_only,
        say=_say,
    )
    print(encode(answer) if arguments.json else case_as_text(answer))
    return ExitCode.DONE if answer["ok"] else ExitCode.CHECK_FAILED


def run_all(arguments: argparse.Namespace) -> int:
    """Run every kernel's case and write the table; exit code 1 when one of ours is less accurate than its best peer."""
    from pathlib import Path

    from dist_llm.bench.kernel_cases import KERNEL_CASES
    from dist_llm.bench.kernels.page import kernels_page
    from dist_llm.bench.kernels.run import run_in_process
    from dist_llm.utils.errors import ConfigError, ExitCode
    from dist_llm.utils.files import write_atomic

    rounds, malloc = arguments.all_rounds, arguments.all_malloc or "tuned"
    device = _device(arguments.all_device, arguments.all_threads, rounds)
    out = Path(arguments.all_out) if arguments.all_out else None
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the directory {out.parent} is not there")
    answers: list[dict[str, Any]] = []
    start = time.monotonic()
    for name in KERNEL_CASES:
        _say(f"case {len(answers) + 1} of {len(KERNEL_CASES)}: {name}, after {time.monotonic() - start:.0f} s")
        answers.append(run_in_process(name, device, threads=arguments.all_threads, rounds=rounds, malloc=malloc, say=_say))
    page = kernels_page(answers)
    if out is None:
        print(page, end="")
    else:
        write_atomic(out, page.encode())
        print(f"{out} written", file=sys.stderr)
    return ExitCode.DONE if all(answer["ok"] for answer in answers) else ExitCode.CHECK_FAILED
