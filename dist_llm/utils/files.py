"""Files that are either whole or absent, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dist_llm.utils.errors import StorageError

__all__ = ["fsync_dir", "sha256_bytes", "sha256_file", "write_atomic", "write_json"]


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces of constant size."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync_dir(path: Path) -> None:
    """Make the entries of directory ``path`` durable: a rename is only on disk once its directory is."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write ``path`` so that a reader, or a machine that loses power, sees the old file or the new one, never a part.

    Raises:
        StorageError: the disk refuses; the old file, if any, is untouched.
    """
    payload = data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(payload)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # it may never have been made, or its folder be no folder: the first error is the cause
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise StorageError(f"cannot write {path}: {error.strerror or error}; free some space or choose another directory") from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys, atomically."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
