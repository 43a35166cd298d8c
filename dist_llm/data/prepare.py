"""From sources to a corpus: tokenizer, shards and index, written whole or not at all.

Three passes: the hash of each document (for the split and the fingerprint), the tokenizer, the shards. Memory holds one batch of
text and 32 bytes a document, whatever the size of the sources.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_llm.data.check import check
from dist_llm.data.index import FORMAT_VERSION, INDEX_NAME, TOKENIZER_NAME, Index, Shard, Split, TokenizerInfo, read_index
from dist_llm.data.progress import Progress, SilentProgress
from dist_llm.data.shards import ShardWriter
from dist_llm.data.sources import Document, InvalidUtf8, Source, Tally, open_source, read_documents
from dist_llm.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer
from dist_llm.utils.errors import ConfigError, DataError, StorageError
from dist_llm.utils.files import fsync_dir, write_atomic, write_json

__all__ = ["DEFAULT_SHARD_BYTES", "DEFAULT_VAL_FRACTION", "DEFAULT_VOCAB_SIZE", "prepare"]

DEFAULT_VOCAB_SIZE = 4096
DEFAULT_VAL_FRACTION = 0.02
DEFAULT_SHARD_BYTES = 64 << 20
BATCH_BYTES = 4 << 20  # text encoded at once; enough to keep the threads busy
SPLITS = ("train", "val")
OWN_NAME = re.compile(rf"{re.escape(INDEX_NAME)}|{re.escape(TOKENIZER_NAME)}|(?:{'|'.join(SPLITS)})-[0-9]{{6,}}\.tar")


@dataclass(frozen=True)
class _Plan:
    """What the first pass found: how documents divide, and the identity of the result."""

    fingerprint: str
    val_hashes: frozenset[bytes] | None  # set only where the fraction alone would leave a split empty
    val_limit: int
    text_bytes: int

    def split_of(self, digest: bytes) -> str:
        is_val = digest in self.val_hashes if self.val_hashes is not None else _place(digest) < self.val_limit
        return "val" if is_val else "train"


def prepare(
    sources: Sequence[str],
    out: Path | str,
    *,
    vocab_size: int | None = None,
    tokenizer_file: Path | str | None = None,
    val_fraction: float = DEFAULT_VAL_FRACTION,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    threads: int | None = None,
    text_key: str = "text",
    invalid_utf8: InvalidUtf8 = "error",
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the corpus of ``sources`` to the directory ``out`` and say what it holds.

    A corpus already there is kept when the same sources and options made it and every hash holds, replaced with ``force``, and refused otherwise.

    Returns:
        documents, tokens, text_bytes, shards (a number), tokenizer (path), vocab_size, splits, out, reused.

    Raises:
        ConfigError: an option is out of range, or ``out`` is taken.
        DataError: a source is missing, empty or no text; the tokenizer cannot be used.
        StorageError: the disk refuses.
    """
    progress = progress if progress is not None else SilentProgress()
    out = Path(out)
    _check_options(sources, vocab_size, tokenizer_file, val_fraction, shard_bytes, threads)
    opened = [open_source(spec, text_key=text_key, invalid_utf8=invalid_utf8) for spec in sources]
    for source in opened:
        if source.description == "folder" and out.resolve().is_relative_to(Path(source.spec).resolve()):
            raise ConfigError(f"--out {out} lies inside --source {source.spec}, and would be read as text next time; choose another --out")
    tokenizer = Tokenizer.load(Path(tokenizer_file)) if tokenizer_file is not None else None
    wanted = vocab_size if vocab_size is not None else DEFAULT_VOCAB_SIZE
    options = {
        "val_fraction": val_fraction,
        "shard_bytes": shard_bytes,
        "tokenizer": tokenizer.sha256 if tokenizer is not None else {"vocab_size": wanted},
    }
    _refuse_taken(out, force=force)
    plan, described = _survey(opened, options, progress)
    if (out / INDEX_NAME).is_file() and not force and (kept := _kept(out, plan.fingerprint, progress)) is not None:
        return _summary(kept, reused=True)
    part = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        if tokenizer is None:
            tokenizer = _train_tokenizer(opened, plan, wanted, progress)
        write_atomic(part / TOKENIZER_NAME, tokenizer.model)
        splits = _write_shards(opened, part, plan, tokenizer, shard_bytes, threads or os.cpu_count() or 1, progress)
        index = Index(out, plan.fingerprint, _describe(tokenizer), splits, tuple(described), options)
        write_json(part / INDEX_NAME, index.to_json())
        _move_into_place(part, out)
    except OSError as error:
        raise StorageError(f"cannot write the corpus {out}: {error.strerror}; free some space or choose another --out") from error
    finally:
        # Gone already when all went well. On an error or Ctrl-C, nothing half-written stays.
        shutil.rmtree(part, ignore_errors=True)
    return _summary(index, reused=False)


def _check_options(
    sources: Sequence[str],
    vocab_size: int | None,
    tokenizer_file: Path | str | None,
    val_fraction: float,
    shard_bytes: int,
    threads: int | None,
) -> None:
    if not sources:
        raise ConfigError("there is no source; name at least one with --source")
    if vocab_size is not None and tokenizer_file is not None:
        raise ConfigError("--tokenizer brings its own vocabulary; give --tokenizer or --vocab-size, not both")
    if vocab_size is not None and vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"--vocab-size {vocab_size} is too small: 256 byte pieces and the special tokens need at least {MIN_VOCAB_SIZE}")
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"--val-fraction {val_fraction} must be at least 0 and below 1")
    if shard_bytes < 1:
        raise ConfigError(f"the size of a shard must be positive, not {shard_bytes} bytes")
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads} must be at least 1")


def _refuse_taken(out: Path, *, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} exists and is not a directory; choose another --out")
    # Replacing a corpus deletes its directory, so nothing else may be in it.
    foreign = sorted(path.name for path in out.iterdir() if not OWN_NAME.fullmatch(path.name))
    if foreign:
        raise ConfigError(f"{out} holds files that are not of a corpus ({', '.join(foreign[:3])}); move them away, or choose another --out")
    if any(out.iterdir()) and not (out / INDEX_NAME).is_file() and not force:
        raise ConfigError(f"{out} holds shards without {INDEX_NAME}; choose another --out, or replace it with --force")


def _place(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


def _documents(sources: Sequence[Source], tallies: Sequence[Tally]) -> Iterator[tuple[Document, bytes, bytes]]:
    """(document, UTF-8 bytes, sha256) of all sources in order."""
    for source, tally in zip(sources, tallies, strict=True):
        for document in read_documents(source, tally):
            data = document.text.encode()
            yield document, data, hashlib.sha256(data).digest()


def _survey(sources: Sequence[Source], options: dict[str, Any], progress: Progress) -> tuple[_Plan, list[dict[str, Any]]]:
    progress.phase("read", None)
    tallies = [Tally() for _ in sources]
    fingerprint = hashlib.sha256(json.dumps([FORMAT_VERSION, options], sort_keys=True).encode())
    hashes: set[bytes] = set()
    text_bytes = 0
    for document, data, digest in _documents(sources, tallies):
        fingerprint.update(f"{len(document.name.encode())} {document.name}".encode() + digest)
        hashes.add(digest)
        text_bytes += len(data)
        progress.update(text_bytes)
    described = []
    for source, tally in zip(sources, tallies, strict=True):
        for message in tally.messages():
            progress.note(f"source {source.spec}: {message}")
        if tally.documents == 0:
            raise DataError(
                f"source {source.spec} is empty: none of its {len(source.files)} files holds text that can be read; name another --source"
            )
        described.append(
            {
                "source": source.spec,
                "description": source.description,
                "documents": tally.documents,
                "text_bytes": tally.text_bytes,
                "skipped_invalid_utf8": len(tally.invalid_utf8),
                "skipped_empty": tally.empty,
            }
        )
    # Halves of a split go by hash: the same text is never on both sides, and a document stays on its side when others join.
    limit = int(options["val_fraction"] * 2**64)
    val_hashes = None
    num_val = sum(_place(digest) < limit for digest in hashes)
    if num_val == len(hashes):
        val_hashes = frozenset(sorted(hashes)[:-1])
    elif num_val == 0 and limit > 0 and len(hashes) > 1:
        val_hashes = frozenset({min(hashes)})
    return _Plan(fingerprint.hexdigest(), val_hashes, limit, text_bytes), described


def _train_tokenizer(sources: Sequence[Source], plan: _Plan, vocab_size: int, progress: Progress) -> Tokenizer:
    progress.phase("tokenizer", plan.text_bytes)

    def train_texts() -> Iterator[str]:
        done = 0
        for document, data, digest in _documents(sources, [Tally() for _ in sources]):
            done += len(data)
            progress.update(done)
            if plan.split_of(digest) == "train":
                yield document.text

    tokenizer = Tokenizer.train(train_texts(), vocab_size=vocab_size)
    if tokenizer.vocab_size < vocab_size:
        progress.note(f"the text gives a vocabulary of {tokenizer.vocab_size} pieces, not {vocab_size}")
    return tokenizer


def _write_shards(
    sources: Sequence[Source], directory: Path, plan: _Plan, tokenizer: Tokenizer, shard_bytes: int, threads: int, progress: Progress
) -> dict[str, Split]:
    progress.phase("encode", plan.text_bytes)
    done = 0
    with ShardWriter(directory, "train", shard_bytes=shard_bytes) as train, ShardWriter(directory, "val", shard_bytes=shard_bytes) as val:
        writers = {"train": train, "val": val}
        for batch in _batches(_documents(sources, [Tally() for _ in sources])):
            encoded = tokenizer.encode_batch([document.text for document, _, _ in batch], threads=threads)
            for (document, data, digest), tokens in zip(batch, encoded, strict=True):
                writers[plan.split_of(digest)].write(source=document.name, text=data, tokens=tokens)
                done += len(data)
            progress.update(done)
    return {name: _total(writers[name].shards) for name in SPLITS}


def _batches(documents: Iterator[tuple[Document, bytes, bytes]]) -> Iterator[list[tuple[Document, bytes, bytes]]]:
    batch: list[tuple[Document, bytes, bytes]] = []
    size = 0
    for item in documents:
        batch.append(item)
        size += len(item[1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _total(shards: Sequence[Shard]) -> Split:
    return Split(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
        shards=tuple(shards),
    )


def _describe(tokenizer: Tokenizer) -> TokenizerInfo:
    return TokenizerInfo(
        file=TOKENIZER_NAME,
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        unk_id=tokenizer.unk_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )


def _move_into_place(part: Path, out: Path) -> None:
    fsync_dir(part)
    if out.exists() and any(out.iterdir()):
        # A directory cannot be replaced in one step. The old corpus is whole until the new one is, and comes back if the move fails.
        old = part.with_suffix(".old")
        out.rename(old)
        try:
            part.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old)
    else:
        part.rename(out)
    fsync_dir(out.parent)


def _kept(out: Path, fingerprint: str, progress: Progress) -> Index | None:
    """The corpus that is there, if it is the wanted one and whole; None if it has to be written again."""
    index = read_index(out)
    if index.fingerprint != fingerprint:
        raise ConfigError(f"{out} holds a corpus of other sources or options; choose another --out, or replace it with --force")
    problems = check(out, progress=progress)
    if problems:
        progress.note(f"{out} is written again, it is damaged: {problems[0].message}")
        return None
    progress.note(f"{out} is up to date: the same sources and options made it, and every hash holds")
    return index


def _summary(index: Index, *, reused: bool) -> dict[str, Any]:
    splits = index.splits.values()
    return {
        "documents": sum(split.documents for split in splits),
        "tokens": sum(split.tokens for split in splits),
        "text_bytes": sum(split.text_bytes for split in splits),
        "shards": sum(len(split.shards) for split in splits),
        "tokenizer": str(index.tokenizer_path),
        "vocab_size": index.tokenizer.vocab_size,
        "splits": {
            name: {"documents": s.documents, "tokens": s.tokens, "text_bytes": s.text_bytes, "shards": [shard.name for shard in s.shards]}
            for name, s in index.splits.items()
        },
        "out": str(index.directory),
        "reused": reused,
    }
