"""``exit.json``: how an attempt of a run ended, in a place no launcher can lose.

torchrun turns every exit code into 1, srun returns the highest of its tasks, a killed job returns nothing. The ranks
therefore say it in the run directory, and scripts and people read it there (docs/exit-codes.md).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dist_llm.utils.errors import ExitCode, StorageError
from dist_llm.utils.files import write_json

__all__ = ["EXIT_FILE", "ExitRecord", "next_attempt", "read_exit", "write_exit"]

EXIT_FILE = "exit.json"


@dataclass(frozen=True)
class ExitRecord:
    """How one attempt ended. ``rank`` and ``host`` are those of the rank that ended it."""

    code: int
    name: str  # of the ExitCode, lower case; "unknown" for a code that is none
    reason: str
    rank: int | None
    host: str
    step: int | None  # optimiser steps done
    traceback: str | None
    attempt: int
    time: str  # UTC, ISO 8601


def write_exit(
    run_dir: Path,
    *,
    code: int,
    reason: str,
    rank: int | None = None,
    host: str,
    step: int | None = None,
    traceback: str | None = None,
    attempt: int,
) -> bool:
    """Say in ``run_dir/exit.json`` how ``attempt`` ended; returns whether this call said it.

    The first to speak is right: one failing rank brings the others down with it, and what they would say is a
    consequence. A record of the same attempt is therefore kept, one of an earlier attempt replaced.

    Raises:
        StorageError: the disk refuses.
    """
    path = run_dir / EXIT_FILE
    try:
        earlier = read_exit(run_dir)
    except StorageError:
        earlier = None  # damaged: nothing in it is worth keeping
    if earlier is not None and earlier.attempt == attempt:
        return False
    name = ExitCode(code).name.lower() if code in set(ExitCode) else "unknown"
    record = ExitRecord(
        code=int(code),
        name=name,
        reason=reason,
        rank=rank,
        host=host,
        step=step,
        traceback=traceback,
        attempt=attempt,
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )
    write_json(path, asdict(record))
    return True


def read_exit(run_dir: Path) -> ExitRecord | None:
    """The last record of ``run_dir``, or None when no attempt has ended yet.

    Raises:
        StorageError: the file cannot be read or is not a record.
    """
    path = run_dir / EXIT_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read {path}: {error}; move it away if the run shall go on") from error
    try:
        return _record(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{path} is not the record of an exit ({error}); move it away if the run shall go on") from error


def next_attempt(run_dir: Path) -> int:
    """Number of the attempt that starts now: one more than the highest ``logs/attempt-N``, 1 in a new directory."""
    try:
        names = [entry.name for entry in (run_dir / "logs").iterdir() if entry.is_dir()]
    except FileNotFoundError:
        return 1
    except OSError as error:
        raise StorageError(f"cannot list {run_dir / 'logs'}: {error.strerror}; check its owner and permissions") from error
    numbers = [int(match[1]) for name in names if (match := re.fullmatch(r"attempt-([0-9]+)", name))]
    return max(numbers, default=0) + 1


def _record(value: Any) -> ExitRecord:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {type(value).__name__}")
    kinds: dict[str, tuple[type, ...]] = {
        "code": (int,),
        "name": (str,),
        "reason": (str,),
        "rank": (int, type(None)),
        "host": (str,),
        "step": (int, type(None)),
        "traceback": (str, type(None)),
        "attempt": (int,),
        "time": (str,),
    }
    for key, kind in kinds.items():
        if key not in value:
            raise KeyError(key)
        if not isinstance(value[key], kind):
            raise TypeError(f"'{key}' is {value[key]!r}")
    return ExitRecord(**{key: value[key] for key in kinds})
