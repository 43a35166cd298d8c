"""Cut a large plain-text file at blank lines into documents; the pieces put together are the file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["MIN_PIECE_BYTES", "SOFT_PIECE_BYTES", "cut_at_blank_lines"]

MIN_PIECE_BYTES = 8 << 10  # from here on a blank line ends the piece
SOFT_PIECE_BYTES = 16 << 10  # from here on any line end does
MAX_LINE_BYTES = 1 << 20  # a longer line is cut between two characters, so that memory stays bounded


def cut_at_blank_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Pieces of 8 to 16 KiB where the text has blank lines, longer only where a line is.

    A blank line stays with the piece before it. No UTF-8 character is ever divided.
    """
    piece: list[bytes] = []
    size = 0
    carried = b""
    while line := carried + stream.readline(MAX_LINE_BYTES):
        carried = b""
        has_end = line.endswith(b"\n")
        if not has_end and len(line) >= MAX_LINE_BYTES:
            whole = _whole_characters(line)
            line, carried = line[:whole], line[whole:]
        piece.append(line)
        size += len(line)
        is_blank = has_end and not line.strip()
        if (size >= MIN_PIECE_BYTES and is_blank) or (size >= SOFT_PIECE_BYTES):
            yield b"".join(piece)
            piece, size = [], 0
    if piece:
        yield b"".join(piece)


def _whole_characters(data: bytes) -> int:
    """Length of ``data`` without a character that began in its last three bytes and is not finished."""
    for back in range(1, 4):
        byte = data[-back]
        if byte >= 0xC0:  # a lead byte; the character has 2, 3 or 4 bytes
            needs = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if needs > back else len(data)
        if byte < 0x80:
            break
    return len(data)
