"""Is a corpus still what was written? Every hash, count and member, and the text behind the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_llm.data.index import INDEX_NAME, Index, Shard, check_tokenizer, read_index
from dist_llm.data.progress import Progress, SilentProgress
from dist_llm.data.shards import Sample, ShardError, ShardReader
from dist_llm.data.tokenizer import Tokenizer, token_dtype
from dist_llm.utils.errors import DataError
from dist_llm.utils.files import sha256_bytes, sha256_file

__all__ = ["Problem", "check"]

MOST_PER_SHARD = 20  # a wrong tokenizer spoils every document; the first ones say it


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that does not hold.

    ``kind``: index, tokenizer, missing, truncated, hash, count, member, or unlisted (a shard the index does not know).
    """

    shard: str
    kind: str
    message: str


def check(directory: Path | str, *, progress: Progress | None = None) -> list[Problem]:
    """Everything that is wrong with the corpus in ``directory``; an empty list when nothing is."""
    progress = progress if progress is not None else SilentProgress()
    directory = Path(directory)
    try:
        index = read_index(directory)
    except DataError as error:
        return [Problem(INDEX_NAME, "index", str(error))]
    problems: list[Problem] = []
    tokenizer = _tokenizer(index, problems)
    progress.phase("check", sum(shard.size for split in index.splits.values() for shard in split.shards))
    done = 0
    listed = set()
    for name, split in index.splits.items():
        for total in ("documents", "tokens", "text_bytes"):
            stated, summed = getattr(split, total), sum(getattr(shard, total) for shard in split.shards)
            if stated != summed:
                problems.append(Problem(INDEX_NAME, "count", f"split '{name}' states {stated} {total}, its shards add up to {summed}"))
        for shard in split.shards:
            listed.add(shard.name)
            problems += _check_shard(index, shard, tokenizer)
            done += shard.size
            progress.update(done)
    for path in sorted(directory.glob("*.tar")):
        if path.name not in listed:
            problems.append(Problem(path.name, "unlisted", f"shard {path} is not in {INDEX_NAME} and is never read; remove it"))
    return problems


def _tokenizer(index: Index, problems: list[Problem]) -> Tokenizer | None:
    info = index.tokenizer
    try:
        check_tokenizer(index)
        tokenizer = Tokenizer.load(index.tokenizer_path)
    except DataError as error:
        problems.append(Problem(info.file, "tokenizer", str(error)))
        return None
    for key in ("vocab_size", "pad_id", "unk_id", "bos_id", "eos_id"):
        stated, found = getattr(info, key), getattr(tokenizer, key)
        if stated != found:
            problems.append(Problem(info.file, "tokenizer", f"{key} of {index.tokenizer_path} is {found}, the index says {stated}"))
    return tokenizer


def _check_shard(index: Index, shard: Shard, tokenizer: Tokenizer | None) -> Iterator[Problem]:
    path = index.directory / shard.name
    if not path.is_file():
        yield Problem(shard.name, "missing", f"shard {path} is missing")
        return
    size = path.stat().st_size
    if size < shard.size:
        yield Problem(shard.name, "truncated", f"shard {path} is truncated: {size} bytes, the index says {shard.size}")
        return
    found = sha256_file(path)
    if size > shard.size:
        yield Problem(shard.name, "hash", f"shard {path} is {size} bytes long, the index says {shard.size}")
    elif found != shard.sha256:
        yield Problem(shard.name, "hash", f"shard {path} is damaged: its sha256 is {found}, the index says {shard.sha256}")
    # Members are looked at even when the hash is wrong: they tell which document is hit.
    try:
        reader = ShardReader(path)
    except ShardError as error:
        yield Problem(shard.name, error.kind, str(error))
        return
    text_bytes = 0
    reported = 0
    for number in range(len(reader)):
        try:
            sample = reader.sample(number)
            text_bytes += sample.text_bytes
            message = _wrong_with(sample, tokenizer, index)
        except DataError as error:
            message = str(error)
        if message:
            reported += 1
            if reported <= MOST_PER_SHARD:
                yield Problem(shard.name, "member", message)
    if reported > MOST_PER_SHARD:
        yield Problem(shard.name, "member", f"and {reported - MOST_PER_SHARD} more documents of {len(reader)}")
    counts = (
        ("documents", len(reader), shard.documents),
        ("tokens", int(reader.lengths.sum()), shard.tokens),
        ("text_bytes", text_bytes, shard.text_bytes),
    )
    for name, have, stated in counts:
        if have != stated:
            yield Problem(shard.name, "count", f"shard {path} holds {have} {name}, the index says {stated}")


def _wrong_with(sample: Sample, tokenizer: Tokenizer | None, index: Index) -> str | None:
    where = f"document {sample.key} ({sample.source})"
    vocab_size = index.tokenizer.vocab_size
    if sample.tokens.dtype != token_dtype(vocab_size):
        return f"{where} holds {sample.tokens.dtype} tokens, a vocabulary of {vocab_size} is stored as {token_dtype(vocab_size)}"
    if len(sample.tokens) and int(sample.tokens.max()) >= vocab_size:
        return f"{where} holds token {int(sample.tokens.max())}, the vocabulary ends at {vocab_size - 1}"
    if tokenizer is None:
        return None
    text = tokenizer.decode_bytes(sample.tokens)
    if len(text) != sample.text_bytes or sha256_bytes(text) != sample.text_sha256:
        return f"{where} does not decode to the text it was made from ({len(text)} bytes, {sample.text_bytes} recorded)"
    return None
