"""Prepare, check and show corpora.

  dist-llm data prepare --source stdlib --out data/stdlib
  dist-llm data prepare --source books/ notes.txt chats.jsonl --out data/mine --vocab-size 8192
  dist-llm data check data/stdlib
  dist-llm data show data/stdlib --split val -n 3

A corpus is a directory with index.json, tokenizer.model and shards in webdataset's tar format; docs/data.md describes it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from itertools import islice
from typing import Any

from dist_llm.utils.errors import ConfigError, ExitCode

__all__ = ["add_arguments", "run"]

SHOWN_CHARS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `prepare`, `check` and `show`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{prepare,check,show}")
    prepare = actions.add_parser(
        "prepare", help="write tokenizer, shards and index", description="Write a corpus: tokenizer, shards and index."
    )
    prepare.add_argument(
        "--source",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="files, folders, .jsonl files, or the words 'stdlib', this Python's own library, and 'stdlib-tests', its test suites",
    )
    prepare.add_argument("--out", required=True, metavar="DIR", help="directory to write; it appears whole or not at all")
    pieces = prepare.add_mutually_exclusive_group()
    pieces.add_argument("--tokenizer", metavar="FILE", help="use this lossless sentencepiece model instead of training one")
    pieces.add_argument(
        "--vocab-size", type=int, metavar="N", help="pieces of the tokenizer that is trained (default 4096; a small text gives fewer)"
    )
    prepare.add_argument(
        "--val-fraction", type=float, default=0.02, metavar="X", help="share of the documents held out, by hash (default 0.02)"
    )
    prepare.add_argument("--shard-mb", type=float, default=64.0, metavar="MB", help="size of a shard in MiB, about (default 64)")
    prepare.add_argument("--text-key", default="text", metavar="KEY", help="key of the text in .jsonl files (default text)")
    prepare.add_argument(
        "--invalid-utf8",
        choices=("error", "skip"),
        default="error",
        help="documents that are not UTF-8: stop (default), or leave them out and say how many",
    )
    prepare.add_argument("--threads", type=int, metavar="N", help="threads that encode (default: all cores)")
    prepare.add_argument("--force", action="store_true", help="replace a different corpus in DIR")
    prepare.add_argument("--json", action="store_true", help="answer with one JSON object on stdout")

    check = actions.add_parser(
        "check",
        help="verify every hash, count and member",
        description="Verify every hash, count and member of a corpus. Exit 65 when something is wrong.",
    )
    check.add_argument("directory", metavar="DIR", help="a corpus")
    check.add_argument("--json", action="store_true", help="answer with one JSON object on stdout")

    show = actions.add_parser("show", help="print decoded samples", description="Print documents of a corpus, decoded from their tokens.")
    show.add_argument("directory", metavar="DIR", help="a corpus")
    show.add_argument("--split", default="train", help="train (default) or val")
    show.add_argument("-n", type=int, default=3, metavar="N", help="documents to print (default 3)")


def run(args: argparse.Namespace) -> int:
    """Do what was asked and return the exit code."""
    return {"prepare": _prepare, "check": _check, "show": _show}[args.action](args)


def _prepare(args: argparse.Namespace) -> int:
    from dist_llm.data.prepare import prepare
    from dist_llm.data.progress import ConsoleProgress

    # A scheduler's SIGTERM ends the work like Ctrl-C does: nothing half-written stays.
    before = signal.signal(signal.SIGTERM, _interrupt)
    progress = ConsoleProgress()
    try:
        answer = prepare(
            args.source,
            args.out,
            vocab_size=args.vocab_size,
            tokenizer_file=args.tokenizer,
            val_fraction=args.val_fraction,
            shard_bytes=int(args.shard_mb * 2**20),
            threads=args.threads,
            text_key=args.text_key,
            invalid_utf8=args.invalid_utf8,
            force=args.force,
            progress=progress,
        )
    finally:
        progress.close()
        signal.signal(signal.SIGTERM, before)
    if args.json:
        print(json.dumps(answer))
    else:
        print(f"{answer['out']}: {'kept' if answer['reused'] else 'written'}")
        for name, split in answer["splits"].items():
            print(
                f"  {name:<5}  {split['documents']:,} documents, {split['tokens']:,} tokens, {split['text_bytes']:,} bytes of text, shards: {len(split['shards'])}"
            )
        print(
            f"  tokenizer  {answer['tokenizer']}, {answer['vocab_size']:,} pieces, {answer['text_bytes'] / max(1, answer['tokens']):.2f} bytes a token"
        )
    return ExitCode.DONE


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _check(args: argparse.Namespace) -> int:
    from dist_llm.data.check import check
    from dist_llm.data.progress import ConsoleProgress

    progress = ConsoleProgress()
    try:
        problems = check(args.directory, progress=progress)
    finally:
        progress.close()
    if args.json:
        found = [{"shard": p.shard, "kind": p.kind, "message": p.message} for p in problems]
        print(json.dumps({"ok": not problems, "problems": found}))
    elif not problems:
        print(f"{args.directory}: every hash, count and member is as written")
    if problems:
        for problem in problems:
            print(f"dist-llm data: {problem.kind}: {problem.message}", file=sys.stderr)
        return ExitCode.DATA
    return ExitCode.DONE


def _show(args: argparse.Namespace) -> int:
    from dist_llm.data.text import iter_text

    if args.n < 1:
        raise ConfigError(f"-n {args.n} must be at least 1")
    for name, text in islice(iter_text(args.directory, args.split), args.n):
        shown = text.decode("utf-8", errors="replace")
        print(f"--- {name} ({len(text):,} bytes)")
        print(shown[:SHOWN_CHARS] + (f"\n... {len(shown) - SHOWN_CHARS:,} more characters" if len(shown) > SHOWN_CHARS else ""))
    return ExitCode.DONE
