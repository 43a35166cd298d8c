"""Tar shards in webdataset's layout: one sample a document, ``<key>.json`` and ``<key>.npy``.

``.npy`` holds the tokens (little-endian uint16 or uint32, no special tokens), ``.json`` the source's name and what the text was
(bytes, sha256 of its UTF-8 form, tokens). The same documents give the same file, byte for byte. Reading accepts exactly these
two members and this one array form, and never unpickles.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_llm.data.index import Shard
from dist_llm.utils.errors import DataError
from dist_llm.utils.files import sha256_bytes, sha256_file

__all__ = ["Sample", "ShardError", "ShardReader", "ShardWriter", "open_shard"]

BLOCK = 512
NPY_MAGIC = b"\x93NUMPY\x01\x00"
NPY_HEADER = re.compile(rb"\{'descr': '<u([24])', 'fortran_order': False, 'shape': \((\d+),\), \} *\n")


class ShardError(DataError):
    """A shard is not what its index says. ``kind``: missing, truncated, hash, member or count."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _HashingFile(io.RawIOBase):
    """A file being written, and the hash and length of what went into it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self.hash = hashlib.sha256()
        self.size = 0
        self.is_abandoned = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.is_abandoned:
            return len(data)
        self._file.write(data)
        self.hash.update(data)
        self.size += len(data)
        return len(data)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        super().close()


class ShardWriter:
    """Writes the documents of one split to ``<split>-000000.tar``, ``<split>-000001.tar`` ... of about ``shard_bytes`` each.

    Use as a context; ``shards`` is complete after leaving it.
    """

    def __init__(self, directory: Path, split: str, *, shard_bytes: int) -> None:
        self._directory = directory
        self._split = split
        self._shard_bytes = shard_bytes
        self._file: _HashingFile | None = None
        self._tar: Any = None
        self._counts = [0, 0, 0]
        self._documents = 0
        self.shards: list[Shard] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._file is not None:
                # tarfile writes its end once more when it is collected; by then that must not reach the file.
                self._file.is_abandoned = True
                self._tar.close()
                self._file.close()

    def write(self, *, source: str, text: bytes, tokens: np.ndarray) -> None:
        """Append one document: ``text`` is the UTF-8 original, ``tokens`` (num_tokens,) its ids."""
        if self._file is None:
            self._open()
        description = {"source": source, "bytes": len(text), "sha256": sha256_bytes(text), "tokens": len(tokens)}
        array = io.BytesIO()
        np.lib.format.write_array(array, tokens, version=(1, 0), allow_pickle=False)
        # One number over the whole split: keys stay unique when shards are read as one stream.
        key = f"{self._split}-{self._documents:09d}"
        self._tar.write({"__key__": key, "json": json.dumps(description, sort_keys=True).encode(), "npy": array.getvalue()})
        self._documents += 1
        self._counts = [self._counts[0] + 1, self._counts[1] + len(tokens), self._counts[2] + len(text)]
        assert self._file is not None
        if self._file.size >= self._shard_bytes:
            self._finish()

    def _open(self) -> None:
        from webdataset import TarWriter

        self._file = _HashingFile(self._directory / self._name)
        # Times and owners would make two equal corpora differ.
        self._tar = TarWriter(self._file, user="dist_llm", group="dist_llm", mode=0o444, mtime=0, encoder=False)

    @property
    def _name(self) -> str:
        return f"{self._split}-{len(self.shards):06d}.tar"

    def _finish(self) -> None:
        if self._file is None:
            return
        self._tar.close()
        self._file.sync()
        self._file.close()
        documents, tokens, text_bytes = self._counts
        digest, size = self._file.hash.hexdigest(), self._file.size
        self.shards.append(Shard(self._name, documents, tokens, text_bytes, size, digest))
        self._file = self._tar = None
        self._counts = [0, 0, 0]


@dataclass(frozen=True, slots=True)
class Sample:
    """One document as it lies in a shard; ``tokens`` is a view into the mapped file."""

    key: str
    source: str
    text_bytes: int
    text_sha256: str
    tokens: np.ndarray


class ShardReader:
    """Random access to the documents of one shard, through a memory map.

    The table of offsets is read from the tar headers here. ``lengths``: (documents,) int64, tokens of each document.

    Raises:
        ShardError: something in the file is not a member as ``ShardWriter`` writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
        keys, descriptions, arrays = [], [], []
        members = _members(path, self._data)
        for key, suffix, start, size in members:
            if suffix != "json":
                raise ShardError("member", f"{path}: member {key}.{suffix} has no {key}.json before it")
            descriptions.append((start, size))
            key_of_array, suffix, start, size = next(members, ("", "", 0, 0))
            if (key_of_array, suffix) != (key, "npy"):
                raise ShardError("member", f"{path}: after {key}.json comes '{key_of_array}.{suffix}', not {key}.npy")
            arrays.append(_array_extent(path, key, self._data[start : start + size]))
            arrays[-1] = (arrays[-1][0], start + arrays[-1][1], arrays[-1][2])
            keys.append(key)
        self.keys = keys
        self._descriptions = descriptions
        self._arrays = arrays
        self.lengths = np.array([length for _, _, length in arrays], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def tokens(self, number: int) -> np.ndarray:
        """Ids of document ``number``: (tokens,) uint16 or uint32, a view that cannot be written to."""
        dtype, start, length = self._arrays[number]
        return np.asarray(self._data[start : start + length * dtype.itemsize]).view(dtype)

    def sample(self, number: int) -> Sample:
        """Document ``number`` with its description.

        Raises:
            ShardError: the description is not as written by ``ShardWriter``.
        """
        start, size = self._descriptions[number]
        key = self.keys[number]
        tokens = self.tokens(number)
        try:
            value = json.loads(self._data[start : start + size].tobytes())
            sample = Sample(key, str(value["source"]), int(value["bytes"]), str(value["sha256"]), tokens)
            stated = int(value["tokens"])
        except (ValueError, TypeError, KeyError) as error:
            raise ShardError("member", f"{self.path}: {key}.json is damaged ({error})") from error
        if stated != len(tokens):
            raise ShardError("member", f"{self.path}: {key}.json says {stated} tokens, {key}.npy holds {len(tokens)}")
        return sample

    def samples(self) -> Iterator[Sample]:
        """All documents in order."""
        for number in range(len(self)):
            yield self.sample(number)


def open_shard(directory: Path, shard: Shard, *, verify: bool = True) -> ShardReader:
    """Open a shard of an index; ``verify`` compares its length and hash first, its counts are always compared.

    Raises:
        ShardError: it is missing, shorter than written, damaged, or holds other counts than the index says.
    """
    path = directory / shard.name
    way_out = f"run `dist-llm data check {directory}` for the whole picture, and prepare it again"
    if not path.is_file():
        raise ShardError("missing", f"shard {path} is missing; {way_out}")
    size = path.stat().st_size
    if size < shard.size:
        raise ShardError("truncated", f"shard {path} is truncated: {size} bytes, the index says {shard.size}; {way_out}")
    if verify and (size != shard.size or (found := sha256_file(path)) != shard.sha256):
        what = (
            f"{size} bytes, the index says {shard.size}"
            if size != shard.size
            else f"its sha256 is {found[:12]}..., the index says {shard.sha256[:12]}..."
        )
        raise ShardError("hash", f"shard {path} is damaged: {what}; {way_out}")
    reader = ShardReader(path)
    counts = (len(reader), int(reader.lengths.sum()))
    if counts != (shard.documents, shard.tokens):
        raise ShardError(
            "count",
            f"shard {path} holds {counts[0]} documents and {counts[1]} tokens, the index says {shard.documents} and {shard.tokens}; {way_out}",
        )
    return reader


def _members(path: Path, data: np.ndarray) -> Iterator[tuple[str, str, int, int]]:
    """(key, suffix, start of content, size) of each tar member; only plain files with the two known suffixes are accepted."""
    at = 0
    while at + BLOCK <= len(data):
        header = data[at : at + BLOCK].tobytes()
        if not header.strip(b"\0"):
            return  # the end-of-archive block
        stated = header[148:156].strip(b" \0")
        if not stated.isdigit() or int(stated, 8) != sum(header) - sum(header[148:156]) + 8 * 32:
            raise ShardError("member", f"{path}: the tar header at offset {at} is damaged: its checksum does not hold")
        name = header[:100].rstrip(b"\0").decode("ascii", errors="replace")
        key, _, suffix = name.partition(".")
        if header[156:157] not in (b"0", b"\0") or suffix not in ("json", "npy"):
            raise ShardError(
                "member", f"{path}: member '{name}' at offset {at} is not a plain .json or .npy file; nothing else may be in a shard"
            )
        size = int(header[124:136].strip(b" \0"), 8)
        start = at + BLOCK
        if start + size > len(data):
            raise ShardError("truncated", f"{path}: member '{name}' ends at {start + size}, after the end of the file ({len(data)} bytes)")
        yield key, suffix, start, size
        at = start + -(-size // BLOCK) * BLOCK
    raise ShardError("truncated", f"{path}: the end-of-archive block is missing")


def _array_extent(path: Path, key: str, data: np.ndarray) -> tuple[np.dtype[Any], int, int]:
    """Type, start and length of the one array form that is accepted."""
    head = data[:10].tobytes()
    length = int.from_bytes(head[8:10], "little")
    match = NPY_HEADER.fullmatch(data[10 : 10 + length].tobytes())
    if not head.startswith(NPY_MAGIC) or match is None:
        raise ShardError("member", f"{path}: {key}.npy is not a one-dimensional array of little-endian uint16 or uint32")
    dtype = np.dtype(f"<u{int(match[1])}")
    if 10 + length + int(match[2]) * dtype.itemsize != len(data):
        raise ShardError(
            "member", f"{path}: {key}.npy is {len(data)} bytes long, its header says {int(match[2])} tokens of {dtype.itemsize} bytes"
        )
    return dtype, 10 + length, int(match[2])
