"""``index.json``: what a prepared corpus holds, with a hash for everything in it.

The index is the only entrance to a corpus: nothing is found by listing the directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_llm.utils.errors import DataError
from dist_llm.utils.files import sha256_file

__all__ = [
    "FORMAT_VERSION",
    "INDEX_NAME",
    "TOKENIZER_NAME",
    "Index",
    "Shard",
    "Split",
    "TokenizerInfo",
    "check_tokenizer",
    "load_index",
    "read_index",
]

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.model"


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """The tokenizer that wrote the shards."""

    file: str
    sha256: str
    vocab_size: int
    pad_id: int
    unk_id: int
    bos_id: int
    eos_id: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file. ``tokens`` counts what the documents hold, without begin and end tokens."""

    name: str
    documents: int
    tokens: int
    text_bytes: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Split:
    """The shards of ``train`` or ``val`` and their sums."""

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[Shard, ...]

    @property
    def stream_tokens(self) -> int:
        """Length of the split laid out as one stream: each document between a begin and an end token."""
        return self.tokens + 2 * self.documents


@dataclass(frozen=True)
class Index:
    """A prepared corpus; see ``load_index``."""

    directory: Path
    fingerprint: str
    tokenizer: TokenizerInfo
    splits: Mapping[str, Split]
    sources: tuple[Mapping[str, Any], ...]
    options: Mapping[str, Any]

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return self.directory / self.tokenizer.file

    def split(self, name: str) -> Split:
        """The split called ``name``.

        Raises:
            DataError: there is none.
        """
        if name not in self.splits:
            raise DataError(f"corpus {self.directory} has no split '{name}'; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]

    def to_json(self) -> dict[str, Any]:
        """What ``index.json`` says."""
        return {
            "format": "dist_llm corpus",
            "version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "tokenizer": asdict(self.tokenizer),
            "splits": {name: asdict(split) for name, split in self.splits.items()},
            "sources": [dict(source) for source in self.sources],
            "options": dict(self.options),
        }


def load_index(directory: Path | str) -> Index:
    """The index of a corpus whose tokenizer is the one its shards were written with.

    Raises:
        DataError: the directory, the index or the tokenizer is missing, damaged or of another version.
    """
    index = read_index(directory)
    check_tokenizer(index)
    return index


def check_tokenizer(index: Index) -> None:
    """Compare the tokenizer's file with the hash in the index.

    Raises:
        DataError: it is missing or another one.
    """
    path, wanted = index.tokenizer_path, index.tokenizer.sha256
    if not path.is_file():
        raise DataError(f"tokenizer {path} is missing; put back the file with sha256 {wanted[:12]}..., or prepare it again with --force")
    found = sha256_file(path)
    if found != wanted:
        raise DataError(
            f"tokenizer {path} does not match the shards: its sha256 is {found[:12]}..., they were written with {wanted[:12]}...; "
            "put the right file back, or prepare it again with --force"
        )


def read_index(directory: Path | str) -> Index:
    """The index as it is written, whatever has become of the files it names.

    Raises:
        DataError: the directory or the index is missing, damaged or of another version.
    """
    directory = Path(directory)
    path = directory / INDEX_NAME
    if not directory.is_dir():
        raise DataError(f"there is no corpus at {directory}; write one with `dist-llm data prepare --source PATH --out {directory}`")
    if not path.is_file():
        raise DataError(
            f"{directory} is not a prepared corpus: it has no {INDEX_NAME}; write one with `dist-llm data prepare --source PATH --out DIR`"
        )
    try:
        value = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: it is not JSON ({error}); prepare it again with --force") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    version = value.get("version") if isinstance(value, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}; prepare it again with --force, or read it with the program that wrote it"
        )
    reader = _Reader(path)
    splits = {name: _split(reader, split, f"splits.{name}") for name, split in reader.get(value, "splits", dict).items()}
    return Index(
        directory=directory,
        fingerprint=reader.get(value, "fingerprint", str),
        tokenizer=_tokenizer(reader, reader.get(value, "tokenizer", dict)),
        splits=splits,
        sources=tuple(reader.get(value, "sources", list)),
        options=reader.get(value, "options", dict),
    )


def _tokenizer(reader: _Reader, value: dict[str, Any]) -> TokenizerInfo:
    ids = {key: reader.get(value, key, int, "tokenizer") for key in ("vocab_size", "pad_id", "unk_id", "bos_id", "eos_id")}
    return TokenizerInfo(file=reader.file_name(value, "file", "tokenizer"), sha256=reader.get(value, "sha256", str, "tokenizer"), **ids)


def _split(reader: _Reader, value: dict[str, Any], where: str) -> Split:
    counts = {key: reader.count(value, key, where) for key in ("documents", "tokens", "text_bytes")}
    shards = []
    for number, item in enumerate(reader.get(value, "shards", list, where)):
        place = f"{where}.shards.{number}"
        numbers = {key: reader.count(item, key, place) for key in ("documents", "tokens", "text_bytes", "size")}
        shards.append(Shard(name=reader.file_name(item, "name", place), sha256=reader.get(item, "sha256", str, place), **numbers))
    return Split(shards=tuple(shards), **counts)


class _Reader:
    """Takes typed values out of parsed JSON; an error says where in which file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, value: Any, key: str, kind: type, where: str = "") -> Any:
        name = f"{where}.{key}" if where else key
        found = value.get(key) if isinstance(value, dict) else None
        if not isinstance(found, kind) or isinstance(found, bool):
            raise DataError(f"{self.path} is damaged: {name} must be of type {kind.__name__}, not {found!r}; prepare it again with --force")
        return found

    def count(self, value: Any, key: str, where: str) -> int:
        number: int = self.get(value, key, int, where)
        if number < 0:
            raise DataError(f"{self.path} is damaged: {where}.{key} is {number}, a count cannot be negative; prepare it again with --force")
        return number

    def file_name(self, value: Any, key: str, where: str) -> str:
        # An index is data from elsewhere: it names files of its own directory, never a path out of it.
        name: str = self.get(value, key, str, where)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise DataError(f"{self.path} is damaged: {where}.{key} is {name!r}, not a plain file name; prepare it again with --force")
        return name
