"""A lossless sentencepiece tokenizer: ``decode(encode(text)) == text`` for every text.

Byte-pair encoding with the identity normalisation, white space kept and byte fallback. One character needs care: sentencepiece
writes a space as U+2581, so that a real U+2581 in a text would come back as a space. Here it is never shown to the model but
written as its three byte pieces, which any sentencepiece reader decodes to U+2581; there is no escape sequence.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_llm.utils.errors import ConfigError, DataError
from dist_llm.utils.files import write_atomic

__all__ = ["BOS_ID", "EOS_ID", "MIN_VOCAB_SIZE", "PAD_ID", "UNK_ID", "Tokenizer", "token_dtype"]

# Ids of the special tokens in every tokenizer trained here. A foreign model keeps its own; the index records them.
PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3

META_SPACE = "\u2581"
# A newline with its indentation is one token in code. Declared, not learned, because pieces never cross white space.
NEWLINE_INDENTS = tuple("\n" + META_SPACE * width for width in range(4, 28, 4))
# Always pieces, seen or not. The space must be one: through byte fallback it would become the bytes of U+2581.
REQUIRED_CHARS = META_SPACE + "\n\t"
MIN_VOCAB_SIZE = 4 + 256 + len(NEWLINE_INDENTS) + 54  # specials, bytes, indents, and some room for characters

SAMPLE_BYTES = 8 << 20  # more text changes the pieces little: 3.43 to 3.57 bytes a token from 4 to 32 MB at 4096 pieces
CHUNK_CHARS = 4096

# Texts that a lossy model changes; a foreign model has to give each of them back.
PROBES = (
    "a",
    "  two  spaces ",
    "\tx\r\n    y\n\n",
    "<s></s><0x0A>",
    "e\u0301\ufb01\u00e9\uff21",
    "\0\x01\x7f",
    "\u65e5\u672c \U0001f600",
    "\ufffd",
)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest of the two stored types, little-endian uint16 and uint32, that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class Tokenizer:
    """Text to ids and back, without special tokens.

    ``bos_id``, ``eos_id``, ``pad_id`` and ``unk_id`` are never the result of ``encode``, whatever the text contains.
    """

    def __init__(self, model: bytes, *, name: str = "tokenizer") -> None:
        import sentencepiece

        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{name} is not a sentencepiece model ({len(model)} bytes); give a file written by sentencepiece or `dist-llm data prepare`"
            ) from error
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._sp.vocab_size()
        self.dtype = token_dtype(self.vocab_size)
        self.unk_id: int = self._sp.unk_id()
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError(
                f"{name} has no begin or end token (bos {self.bos_id}, eos {self.eos_id}); train it with both, documents are laid between them"
            )
        # sentencepiece's own default has no padding token; padding is never a target, so that any id will do.
        self.pad_id: int = self._sp.pad_id() if self._sp.pad_id() >= 0 else self.eos_id
        self._meta_ids = np.array([self._byte_id(byte, name) for byte in META_SPACE.encode()], dtype=self.dtype)
        self._refuse_lossy(name)

    def _byte_id(self, byte: int, name: str) -> int:
        piece_id: int = self._sp.piece_to_id(f"<0x{byte:02X}>")
        if not self._sp.is_byte(piece_id):
            raise DataError(f"{name} has no byte pieces, so that it cannot write every text; train it with byte_fallback=true")
        return piece_id

    def _refuse_lossy(self, name: str) -> None:
        for probe in PROBES:
            back = self.decode(self.encode(probe))
            if back != probe:
                raise DataError(
                    f"{name} is not lossless: {probe!r} comes back as {back!r}; train it with normalization_rule_name=identity, "
                    "add_dummy_prefix=false, remove_extra_whitespaces=false, byte_fallback=true"
                )

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """The tokenizer in a sentencepiece model file.

        Raises:
            DataError: the file is missing, is no sentencepiece model, or does not give every text back.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        return cls(model, name=f"the tokenizer {path}")

    @classmethod
    def train(cls, documents: Iterable[str], *, vocab_size: int, out: Path | None = None) -> Tokenizer:
        """Learn pieces from ``documents`` and write the model to ``out``.

        The pieces come from a sample of the text that depends on its content only, in one thread: the same documents in any order
        give the same file. A text too small for ``vocab_size`` pieces gives fewer.

        Raises:
            ConfigError: ``vocab_size`` has no room for the byte pieces.
            DataError: there is no text.
        """
        import sentencepiece

        if vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"vocabulary size {vocab_size} is too small: 256 byte pieces and the special tokens need at least {MIN_VOCAB_SIZE}"
            )
        sample = _without_rare_characters(_sample(documents), (vocab_size - 256) // 4)
        if not any(chunk.strip() for chunk in sample):
            raise DataError(
                "there is no text to train a tokenizer on; add sources that hold more than white space, or give --tokenizer FILE"
            )
        buffer = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9999,
            required_chars=REQUIRED_CHARS,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,  # runs of spaces: 1.85 -> 2.66 bytes a token on Python source at 2048 pieces
            split_by_unicode_script=False,  # "self." may be one piece: 2.68 -> 2.81
            user_defined_symbols=list(NEWLINE_INDENTS),  # 2.96 -> 3.02
            max_sentence_length=8 * CHUNK_CHARS,  # in bytes; longer ones would be dropped
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            num_threads=1,  # the model file records it, and its hash is to depend on the text only
            minloglevel=2,
        )
        tokenizer = cls(buffer.getvalue())
        if out is not None:
            write_atomic(Path(out), tokenizer.model)
        return tokenizer

    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``: (tokens,) uint16, or uint32 for more than 65,536 pieces."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[np.ndarray]:
        """Ids of each text, computed on ``threads`` threads.

        Raises:
            DataError: a text holds half of a surrogate pair, which has no UTF-8 form.
        """
        parts: list[str] = []
        counts: list[int] = []
        for text in texts:
            pieces = text.split(META_SPACE)
            parts.extend(pieces)
            counts.append(len(pieces))
        try:
            encoded = self._sp.encode(parts, out_type=int, num_threads=threads)
        except (UnicodeEncodeError, TypeError) as error:  # which of the two depends on sentencepiece's version
            _refuse_surrogates(texts)
            raise AssertionError("sentencepiece refused a text that is valid UTF-8") from error
        result = []
        at = 0
        for count in counts:
            row = [np.asarray(encoded[at], dtype=self.dtype)]
            for ids in encoded[at + 1 : at + count]:
                row += [self._meta_ids, np.asarray(ids, dtype=self.dtype)]
            result.append(row[0] if count == 1 else np.concatenate(row))
            at += count
        return result

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The UTF-8 bytes that ``ids`` stand for; special tokens stand for none.

        Exact for what ``encode`` wrote. Ids from a model may stop within a character, hence bytes.
        """
        table = self._piece_bytes
        numbers = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if numbers and not (min(numbers) >= 0 and max(numbers) < len(table)):
            wrong = next(i for i in numbers if not 0 <= i < len(table))
            raise DataError(f"token {wrong} is not in the vocabulary of {len(table)}; the tokens were written with another tokenizer")
        return b"".join([table[i] for i in numbers])

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of ``ids``; bytes that are no UTF-8 (a model may write such) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @functools.cached_property
    def _piece_bytes(self) -> list[bytes]:
        return [self._bytes_of(i) for i in range(self.vocab_size)]

    def _bytes_of(self, piece_id: int) -> bytes:
        if self._sp.is_control(piece_id) or self._sp.is_unknown(piece_id):
            return b""
        piece: str = self._sp.id_to_piece(piece_id)
        if self._sp.is_byte(piece_id):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        return piece.replace(META_SPACE, " ").encode()


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for text in texts:
        for at, char in enumerate(text):
            if "\ud800" <= char <= "\udfff":
                raise DataError(
                    f"character {at} of the text is the lone surrogate U+{ord(char):04X}, which is not Unicode text; remove or replace it"
                )


def _chunks(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        end = text.rfind("\n", at, at + CHUNK_CHARS) + 1
        if end <= at:
            end = at + CHUNK_CHARS
        yield text[at:end]
        at = end


def _sample(documents: Iterable[str]) -> list[str]:
    """Chunks with the smallest hashes, up to ``SAMPLE_BYTES``: even over the text, in constant memory, and in an order of its own."""
    heap: list[tuple[int, str]] = []  # largest hash first
    held = 0
    seen: set[int] = set()
    for document in documents:
        for chunk in _chunks(document.replace(META_SPACE, "")):
            data = chunk.encode()
            key = -int.from_bytes(hashlib.sha256(data).digest()[:16], "big")
            if key in seen or (held >= SAMPLE_BYTES and key <= heap[0][0]):
                continue
            heapq.heappush(heap, (key, chunk))
            seen.add(key)
            held += len(data)
            while held - len(heap[0][1].encode()) >= SAMPLE_BYTES:
                key, chunk = heapq.heappop(heap)
                seen.remove(key)
                held -= len(chunk.encode())
    return [chunk for _, chunk in sorted(heap, reverse=True)]


def _without_rare_characters(sample: list[str], most: int) -> list[str]:
    """The sample cut at all but its ``most`` frequent characters, which will be written as bytes: each character asks for a piece of its own."""
    counts = Counter(char for chunk in sample for char in chunk)
    if len(counts) <= most:
        return sample
    # By frequency, then by code point: never by the order in which characters were met.
    kept = {char for char, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]}
    rare = re.compile("[" + "".join(re.escape(char) for char in counts if char not in kept) + "]+")
    return [part for chunk in sample for part in rare.split(chunk) if part]
