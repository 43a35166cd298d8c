"""The command ``dist-llm``: find the verb, import only that verb, turn errors into one message and an exit code."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from dist_llm import __version__
from dist_llm.utils.errors import ExitCode, UserError

__all__ = ["entry", "main"]

# verb: (what it does, module). A module offers `add_arguments(parser)` and `run(args) -> int`.
VERBS = {
    "doctor": ("say what is installed and active on this machine, what is not, and why", "dist_llm.cli.doctor"),
    "data": ("prepare, check and show corpora", "dist_llm.cli.data"),
    "config": ("show, validate and describe configs", "dist_llm.cli.config"),
    "plan": ("what to train, what fits, how fast, before a GPU is asked for", "dist_llm.cli.plan"),
    "train": ("train the run a config describes, or go on with it", "dist_llm.cli.train"),
    "verify": ("prove that parallel layouts compute what one process computes", "dist_llm.cli.verify"),
    "generate": ("continue a prompt with a trained run", "dist_llm.cli.generate"),
    "bench": ("race our code against its peers", "dist_llm.cli.bench"),
    "report": ("draw a run as one HTML file", "dist_llm.cli.report"),
}


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {text}" for name, (text, _) in VERBS.items())
    return (
        "usage: dist-llm VERB [arguments]\n\n"
        "Train language models on SLURM clusters, and trust the numbers.\n\n"
        f"verbs:\n{verbs}\n\n"
        "  dist-llm VERB --help      what the verb takes\n"
        "  dist-llm --version\n\n"
        "Exit codes are listed in docs/exit-codes.md.\n"
    )


def _drop_launcher_arguments(argv: list[str]) -> list[str]:
    # The deepspeed launcher puts --local_rank=N first; the rank comes from the environment, so it says nothing new.
    return [a for i, a in enumerate(argv) if not (i == 0 and a.startswith(("--local_rank=", "--local-rank=")))]


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    # Options may stand between positional words (`train CONFIG --dry-run a.b=c`), which parse_args would not take; verbs with
    # sub-verbs cannot be parsed that way and do not need it.
    has_subverbs = any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)
    return parser.parse_args(arguments) if has_subverbs else parser.parse_intermixed_args(arguments)


def _drop_stdout() -> None:
    # What still waits in the buffer would fail once more at exit, with a message and an exit code of its own.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def entry() -> NoReturn:
    """The process ``dist-llm``: run the command line and leave with its exit code.

    A process that has loaded torch leaves without taking the interpreter down: threads of torch.distributed and DeepSpeed that ask
    for the interpreter's lock while it shuts down abort the process ("terminate called without an active exception"), after
    everything was done, with an exit code that says the opposite.
    """
    try:
        code = main()
    except SystemExit as leaving:  # argparse: --help, or a wrong option
        code = leaving.code if isinstance(leaving.code, int) else ExitCode.USAGE
    except Exception:  # noqa: BLE001 - the last stop of a failure nobody foresaw: said in full, and a failed rank's exit code
        traceback.print_exc()
        code = ExitCode.CHECK_FAILED
    if "torch" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or broken: the exit code has been decided already
            stream.flush()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = _drop_launcher_arguments(list(sys.argv[1:] if argv is None else argv))
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage(), end="")
        return ExitCode.DONE if arguments else ExitCode.USAGE
    if arguments[0] in ("-V", "--version"):
        print(f"dist-llm {__version__}")
        return ExitCode.DONE
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "; `dist-llm --help` lists them"
        print(f"dist-llm: there is no verb '{verb}'{hint}", file=sys.stderr)
        return ExitCode.USAGE
    text, module_name = VERBS[verb]
    module = importlib.import_module(module_name)
    parser = argparse.ArgumentParser(
        prog=f"dist-llm {verb}", description=module.__doc__ or text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    try:
        code = int(module.run(_parse(parser, rest)))
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be told apart from a crash
        return code
    except UserError as error:
        if not error.is_echo:
            print(f"dist-llm {verb}: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print(f"dist-llm {verb}: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        _drop_stdout()
        return ExitCode.DONE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_stdout()
        print(f"dist-llm {verb}: the disk is full ({error.filename or 'standard output'}); free some space", file=sys.stderr)
        return ExitCode.IO
