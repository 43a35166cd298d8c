"""Files of one JSON object a line, which a process that may be killed at any moment appends to.

Every line is handed to the kernel in one piece, so a killed process loses at most the line it was writing. Such a
torn last line is recognised by its missing newline: readers skip it, the next writer removes it.
JSON has no number for "not a number" and infinity: they are written as the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dist_llm.utils.errors import DataError, StorageError

__all__ = ["append_line", "decode", "encode", "open_lines", "read_lines", "whole_lines"]

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(record: dict[str, Any]) -> bytes:
    """One JSON line; floats that JSON cannot hold become the strings "nan", "inf", "-inf"."""
    safe = {k: str(float(v)) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(safe, allow_nan=False).encode("utf-8") + b"\n"


def decode(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The record of line ``number``, with "nan", "inf" and "-inf" as floats again.

    Raises:
        DataError: the line is no JSON object.
    """
    try:
        record = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one too
        raise DataError(f"{path}, line {number}: not JSON ({error}); remove the line, or restore the file") from error
    if not isinstance(record, dict):
        raise DataError(
            f"{path}, line {number}: a JSON object is needed, this is {type(record).__name__}; remove the line, or restore the file"
        )
    return {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of ``path`` that end in a newline, newline included; nothing where there is no file."""
    try:
        with path.open("rb") as f:
            for line in f:
                if line.endswith(b"\n"):
                    yield line
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}; check that it is a file this user may read") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole record of ``path`` in order; an empty list where there is no file yet."""
    return [decode(line, path, number) for number, line in enumerate(whole_lines(path), start=1) if line.strip()]


def _last_newline(f: IO[bytes]) -> int:
    # Length of the file up to and including its last newline. A torn line is short, so this looks at the end only.
    end = f.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        f.seek(start)
        position = f.read(end - start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0


def open_lines(path: Path) -> IO[bytes]:
    """Open ``path`` for appending, without the torn line that a killed writer may have left.

    Raises:
        StorageError: the file cannot be created or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as f:
            f.truncate(_last_newline(f))
        return path.open("ab")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; free some space or choose another directory") from error


def append_line(f: IO[bytes], record: dict[str, Any], *, durable: bool = False) -> None:
    """Hand one record to the kernel; ``durable`` also waits until the disk has it.

    Raises:
        StorageError: the disk is full or refuses.
    """
    line = encode(record)
    try:
        f.write(line)
        f.flush()
        if durable:
            os.fsync(f.fileno())
    except OSError as error:
        raise StorageError(f"cannot write {f.name}: {error.strerror}; free some space, then start the run again: it resumes") from error
