"""Documents from what a user names: files, folders, jsonl files, and ``stdlib``, the running Python's own library.

``stdlib`` leaves the library's test suites out: some distributions do not install them, so with them the default corpus would be
another one on every machine, and 60 % of it tables and repeated fixtures. ``stdlib-tests`` names them.

The order depends on names only. Bytes that are no UTF-8 are refused with their offset, or skipped and counted when asked.
"""

from __future__ import annotations

import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dist_llm.data.cut import cut_at_blank_lines
from dist_llm.utils.errors import DataError

__all__ = ["STDLIB", "STDLIB_TESTS", "TEXT_SUFFIXES", "Document", "Source", "Tally", "open_source", "read_documents"]

STDLIB = "stdlib"
STDLIB_TESTS = "stdlib-tests"
STDLIB_SUFFIXES = frozenset({".md", ".py", ".rst", ".txt"})
TEST_FOLDERS = frozenset({"idle_test", "test", "tests"})
STDLIB_LEFT_OUT = frozenset({"__pycache__", "dist-packages", "site-packages"})
CODE_SUFFIXES = frozenset(
    {".c", ".cc", ".cmake", ".cpp", ".cs", ".cu", ".cuh", ".go", ".h", ".hpp", ".java", ".jl", ".js", ".kt", ".lua", ".php", ".pl", ".py"}
    | {".pyi", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts"}
)
PROSE_SUFFIXES = frozenset({".bib", ".html", ".ipynb", ".md", ".rst", ".tex", ".txt"})
RECORD_SUFFIXES = frozenset({".cfg", ".css", ".csv", ".ini", ".json", ".jsonl", ".toml", ".tsv", ".xml", ".yaml", ".yml"})
TEXT_SUFFIXES = CODE_SUFFIXES | PROSE_SUFFIXES | RECORD_SUFFIXES
LARGE_TEXT_BYTES = 1 << 20

InvalidUtf8 = Literal["error", "skip"]


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source; ``name`` is what its documents are called."""

    path: Path
    name: str


@dataclass(frozen=True)
class Source:
    """Something a user named, resolved to its files."""

    spec: str
    files: tuple[SourceFile, ...]
    description: str
    invalid_utf8: InvalidUtf8
    text_key: str


@dataclass
class Tally:
    """What a pass over a source met."""

    documents: int = 0
    text_bytes: int = 0
    invalid_utf8: list[str] = field(default_factory=list)
    empty: int = 0
    cut: dict[str, int] = field(default_factory=dict)

    def messages(self) -> list[str]:
        """What a user should know about the pass, a sentence each."""
        lines = [f"{name} is one large text: cut at blank lines into {pieces} documents" for name, pieces in self.cut.items()]
        if self.invalid_utf8:
            some = ", ".join(self.invalid_utf8[:3]) + (", ..." if len(self.invalid_utf8) > 3 else "")
            lines.append(f"skipped {len(self.invalid_utf8)} that are not UTF-8: {some}")
        if self.empty:
            lines.append(f"skipped {self.empty} without text")
        return lines


def open_source(spec: str, *, text_key: str = "text", invalid_utf8: InvalidUtf8 = "error") -> Source:
    """Find the files that ``spec`` stands for; nothing is read yet.

    Raises:
        DataError: there is no such path, or no text file in it.
    """
    if spec in (STDLIB, STDLIB_TESTS):
        root = Path(sysconfig.get_path("stdlib"))
        files = _walk(root, STDLIB, STDLIB_SUFFIXES, left_out=STDLIB_LEFT_OUT)
        files = tuple(file for file in files if _is_test(file.path.relative_to(root)) == (spec == STDLIB_TESTS))
        if not files:
            what = "test suite" if spec == STDLIB_TESTS else "source text"
            raise DataError(f"the standard library at {root} holds no {what}; name a folder or file with --source instead")
        # Some of its tests are in other encodings on purpose; they are left out whatever the user chose for their own files.
        return Source(spec, files, _described(spec), "skip", text_key)
    path = Path(spec)
    if path.is_file():
        return Source(spec, (SourceFile(path, path.name),), "file", invalid_utf8, text_key)
    if path.is_dir():
        files = _walk(path, path.resolve().name, TEXT_SUFFIXES, left_out=frozenset({"__pycache__"}))
        if not files:
            known = " ".join(sorted(TEXT_SUFFIXES))
            raise DataError(f"folder {path} holds no text file; read are {known}, and any file that is named itself")
        return Source(spec, files, "folder", invalid_utf8, text_key)
    if path.exists():
        raise DataError(f"source {path} is neither a file nor a folder")
    raise DataError(
        f"source {path} does not exist; name a file, a folder, a .jsonl file, or '{STDLIB}' for the standard library of this Python"
    )


def _is_test(path: Path) -> bool:
    return not TEST_FOLDERS.isdisjoint(path.parts[:-1])


def _described(spec: str) -> str:
    part = "tests of the standard library" if spec == STDLIB_TESTS else "standard library, without its tests,"
    return f"{part} of {platform.python_implementation()} {platform.python_version()}"


def _walk(root: Path, prefix: str, suffixes: frozenset[str], *, left_out: frozenset[str]) -> tuple[SourceFile, ...]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}") from error

    found = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if name not in left_out and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in suffixes and not name.startswith(".") and path.is_file():
                found.append((path.relative_to(root).as_posix(), path))
    return tuple(SourceFile(path, f"{prefix}/{name}") for name, path in sorted(found))


def read_documents(source: Source, tally: Tally) -> Iterator[Document]:
    """Every document of a source that has text, in the order of names; ``tally`` counts as it goes.

    Raises:
        DataError: a file cannot be read, holds bytes that are no UTF-8, or is no jsonl with the expected key.
    """
    for file in source.files:
        try:
            for document in _read_file(file, source, tally):
                if not document.text:
                    tally.empty += 1
                    continue
                tally.documents += 1
                tally.text_bytes += len(document.text.encode())
                yield document
        except OSError as error:
            raise DataError(f"cannot read {file.path}: {error.strerror}") from error


def _read_file(file: SourceFile, source: Source, tally: Tally) -> Iterator[Document]:
    suffix = file.path.suffix.lower()
    if suffix == ".jsonl":
        yield from _read_jsonl(file, source, tally)
    elif file.path.stat().st_size > LARGE_TEXT_BYTES and (suffix in (".txt", ".md") or suffix not in TEXT_SUFFIXES):
        yield from _read_large_text(file, source, tally)
    else:
        text = _decode(file.path.read_bytes(), file, file.name, 0, source, tally)
        if text is not None:
            yield Document(file.name, text)


def _read_large_text(file: SourceFile, source: Source, tally: Tally) -> Iterator[Document]:
    offset = 0
    with file.path.open("rb") as stream:
        for number, piece in enumerate(cut_at_blank_lines(stream)):
            name = f"{file.name}#{number:06d}"
            text = _decode(piece, file, name, offset, source, tally)
            offset += len(piece)
            tally.cut[file.name] = number + 1
            if text is not None:
                yield Document(name, text)


def _read_jsonl(file: SourceFile, source: Source, tally: Tally) -> Iterator[Document]:
    offset = 0
    with file.path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            name = f"{file.name}:{number}"
            text = _decode(line, file, name, offset, source, tally)
            offset += len(line)
            if text is None or not text.strip():
                continue
            yield Document(name, _text_of(text, source.text_key, f"{file.path}, line {number}"))


def _text_of(line: str, key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}; a .jsonl file has one object a line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is not an object but {type(record).__name__}; a .jsonl file has one object a line")
    if key not in record:
        keys = ", ".join(sorted(record)[:8]) or "none"
        raise DataError(f"{where} has no key '{key}' (its keys: {keys}); name the key of the text with --text-key")
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: '{key}' is not a string but {type(text).__name__}; name the key of the text with --text-key")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} of '{key}' is a lone surrogate, which is not Unicode text; remove or replace it"
        ) from error
    return text


def _decode(data: bytes, file: SourceFile, name: str, offset: int, source: Source, tally: Tally) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if source.invalid_utf8 == "skip":
            tally.invalid_utf8.append(name)
            return None
        at = offset + error.start
        raise DataError(
            f"{file.path} is not UTF-8: byte 0x{data[error.start]:02X} at offset {at} ({error.reason}); convert it, or leave such documents out with --invalid-utf8 skip"
        ) from error
