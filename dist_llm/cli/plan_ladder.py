"""A ladder of small runs for a scaling law: write its configs, and read its results back.

dist-llm plan ladder --budget 2e14 --out ladder --data quickstart/corpus     configs of runs that cost 2e14 FLOPs together
dist-llm plan ladder --budget 40m --speed speed.json --out ladder --data DIR  ... that take 40 minutes at the speed `bench speed` measured
for config in ladder/*.yaml; do dist-llm train $config; done
dist-llm plan ladder --read ladder                                            params,tokens,loss of the finished runs
dist-llm plan fit ladder/ladder.csv --hold-out 1
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from dist_llm.utils.errors import ConfigError, DataError, ExitCode, StorageError

__all__ = ["add_arguments", "run"]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LEAST_FLOPS = 1e9  # a bare number below is seconds without their unit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dist-llm plan ladder``."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--budget", metavar="FLOPS|TIME", help="of all runs together: FLOPs (6 N D), as 2e14, or time, as 90s, 40m, 2h")
    what.add_argument("--read", type=Path, metavar="DIR", help="collect the results of a ladder that was written to DIR")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the configs go; with --read, the CSV file (default DIR/ladder.csv)")
    parser.add_argument("--points", type=int, default=6, metavar="N", help="sizes, each trained three times (default 6)")
    parser.add_argument("--spread", type=float, default=10.0, metavar="X", help="largest over smallest number of parameters (default 10)")
    parser.add_argument("--data", metavar="DIR", help="prepared corpus: gives data.path and the vocabulary")
    parser.add_argument("--vocab-size", type=int, default=None, metavar="V", help="without --data (default 2048)")
    parser.add_argument("--seq-len", type=int, default=256, metavar="T", help="tokens in a row (default 256)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="rows in a step (default 16)")
    parser.add_argument("--ranks", type=int, default=1, metavar="R", help="that each run will be started on (default 1)")
    parser.add_argument("--lr", type=float, default=1e-2, metavar="RATE", help="peak learning rate up to width 128 (default 1e-2)")
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="of weights and data order (default 1234)")
    parser.add_argument(
        "--speed", type=Path, metavar="FILE", help="what `dist-llm bench speed --out FILE` measured; needed for a budget in time"
    )
    parser.add_argument("--json", action="store_true", help="answer with one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Run ``dist-llm plan ladder``."""
    return _read(args) if args.read is not None else _write(args)


def _write(args: argparse.Namespace) -> int:
    from dist_llm.config.write import dump_yaml
    from dist_llm.planning.ladder import design, run_config, seconds_of, within_flops, within_seconds
    from dist_llm.utils.files import write_atomic, write_json

    if args.out is None:
        raise ConfigError("--out DIR is missing: the directory that the configs are written to")
    for name, least in (("points", 3), ("spread", 2), ("seq_len", 2), ("batch_size", 1), ("ranks", 1)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name):g}")
    if args.batch_size % args.ranks:
        raise ConfigError(f"--batch-size {args.batch_size} does not divide over {args.ranks} ranks")
    if not 0 < args.lr < math.inf:
        raise ConfigError(f"--lr must be a positive number, not {args.lr:g}")
    vocab_size, corpus_tokens = _corpus(args)
    speeds = _speeds(args.speed) if args.speed else []
    make = partial(design, sizes=args.points, spread=args.spread, vocab_size=vocab_size, seq_len=args.seq_len, batch_size=args.batch_size)
    amount, is_time = _budget(args.budget)
    if is_time and not speeds:
        raise ConfigError(
            f"--budget {args.budget} is a time: measure this machine with `dist-llm bench speed --out speed.json`, then --speed speed.json"
        )
    rungs = within_seconds(amount, make, speeds) if is_time else within_flops(amount, make, args.points)

    # The directory may hold another ladder, whose configs would be trained with this one's.
    _make_directory(args.out)
    if old := sorted(p.name for p in args.out.glob("*.yaml")):
        raise ConfigError(f"{args.out} already holds configs ({old[0]}, {len(old)} in all); choose another --out")
    rows: list[dict[str, Any]] = []
    for rung in rungs:
        config = run_config(
            rung,
            name=rung.name,
            run_dir=str(args.out / "runs" / rung.name),
            data=args.data,
            batch_size=args.batch_size,
            ranks=args.ranks,
            lr=args.lr,
            seed=args.seed,
        )
        path = args.out / f"{rung.name}.yaml"
        write_atomic(
            path,
            f"# A rung of a scaling ladder: {rung.params:,} parameters, {rung.tokens:,} tokens. `dist-llm plan ladder`.\n{dump_yaml(config)}",
        )
        rows.append(
            {
                "config": str(path),
                "run": config.directory,
                "params": rung.params,
                "tokens": rung.tokens,
                "flops": rung.flops,
                "seconds": seconds_of(rung, speeds) if speeds else None,
                "passes": rung.tokens / corpus_tokens if corpus_tokens else None,
            }
        )
    seconds = [float(r["seconds"]) for r in rows if r["seconds"] is not None]
    answer = {"runs": rows, "flops": sum(r.flops for r in rungs), "seconds": sum(seconds) if seconds else None}
    write_json(args.out / "ladder.json", answer)
    if args.json:
        print(json.dumps(answer))
        return ExitCode.DONE
    for r in rows:
        more = f"  {r['seconds']:6.0f} s" if r["seconds"] is not None else ""
        more += f"  {r['passes']:5.1f} passes" if r["passes"] is not None else ""
        print(f"{r['config']}  {r['params']:>12,} parameters  {r['tokens']:>13,} tokens  {r['flops']:.2e} FLOPs{more}")
    total = f", {answer['seconds']:.0f} s" if seconds else ""
    print(f"{len(rows)} runs, {answer['flops']:.2e} FLOPs{total}. Train them, then read them:")
    print(f"  for config in {args.out}/*.yaml; do dist-llm train $config; done\n  dist-llm plan ladder --read {args.out}")
    if (most := max((r["passes"] or 0.0 for r in rows), default=0.0)) > 4:
        print(
            f"The longest run sees the corpus {most:.1f} times; beyond about 4 a token counts for less (arXiv:2305.16264): a larger corpus is better.",
            file=sys.stderr,
        )
    return ExitCode.DONE


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {path}: {error.strerror}; choose another --out") from error


def _corpus(args: argparse.Namespace) -> tuple[int, int | None]:
    # Vocabulary, and training tokens where the corpus is there.
    if args.data is None:
        return (2048 if args.vocab_size is None else args.vocab_size), None
    from dist_llm.data.index import read_index

    index = read_index(args.data)
    size = index.tokenizer.vocab_size
    if args.vocab_size not in (None, size):
        raise ConfigError(f"--vocab-size {args.vocab_size} is not that of {args.data} ({size}); leave it out")
    return size, index.split("train").stream_tokens


def _budget(text: str) -> tuple[float, bool]:
    # (amount, is it seconds)
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([smhd]?)", text.strip().lower())
    try:
        amount = float(match[1]) if match else math.nan
    except ValueError:
        amount = math.nan
    if match is None or not 0 < amount < math.inf:
        raise ConfigError(f"--budget {text!r} is neither FLOPs (2e14) nor a time (90s, 40m, 2h)")
    if match[2]:
        return amount * _UNITS[match[2]], True
    if amount < _LEAST_FLOPS:
        raise ConfigError(f"--budget {text} would be {amount:g} FLOPs; for a time write {text}s")
    return amount, False


def _speeds(path: Path) -> list[Any]:
    from dist_llm.planning.budget import SpeedPoint

    try:
        points = json.loads(path.read_text(encoding="utf-8"))["points"]
        return [SpeedPoint(**point) for point in points]
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}; write it with `dist-llm bench speed --out {path}`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what `dist-llm bench speed --out {path}` writes ({error}); write it again") from error


def _read(args: argparse.Namespace) -> int:
    from dist_llm.cli.plan_runs import find_runs, run_point
    from dist_llm.utils.files import write_atomic

    points, missing = [], []
    for path in find_runs(args.read):
        point = run_point(path)
        if isinstance(point, str):
            missing.append((path, point))
        else:
            points.append(point)
    for path, reason in missing:
        print(f"{path} is left out: {reason}", file=sys.stderr)
    if not points:
        raise ConfigError(f"no run of {args.read} has finished")
    points.sort(key=lambda p: (p.params, p.tokens))
    table = "params,tokens,loss\n" + "".join(f"{p.params},{p.tokens},{p.loss!r}\n" for p in points)
    out = args.out or args.read / "ladder.csv"
    write_atomic(out, table)
    if args.json:
        rows = [{"run": str(p.run), "params": p.params, "tokens": p.tokens, "loss": p.loss} for p in points]
        print(json.dumps({"csv": str(out), "points": rows, "left_out": [{"run": str(p), "reason": r} for p, r in missing]}))
    else:
        print(table, end="")
        print(f"{len(points)} runs in {out}", file=sys.stderr)
    return ExitCode.DONE
