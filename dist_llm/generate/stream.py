"""Text while it is being written, and how far longer work has come."""

from __future__ import annotations

import codecs
import sys
import time
from typing import TextIO

from dist_llm.data.tokenizer import Tokenizer

__all__ = ["StepProgress", "TextStream"]

LINE_EVERY_S = 5.0


class TextStream:
    """Writes the text of tokens as far as it is final.

    A character may be spread over several tokens: its bytes wait until it is whole. Bytes that are no UTF-8 become U+FFFD, as in
    ``Tokenizer.decode`` of all the tokens together.
    """

    def __init__(self, tokenizer: Tokenizer, out: TextIO) -> None:
        self._tokenizer = tokenizer
        self._out = out
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, token: int) -> None:
        """Write what ``token`` completes."""
        self._put(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def close(self) -> None:
        """The text has ended: half a character will not become a whole one."""
        self._put(self._decoder.decode(b"", final=True))

    def _put(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()


class StepProgress:
    """Tokens done, on stderr: a line that rewrites itself on a terminal, ``key=value`` every few seconds elsewhere."""

    def __init__(self, total: int, out: TextIO | None = None) -> None:
        self._total = total
        self._out = sys.stderr if out is None else out
        self._on_terminal = self._out.isatty()
        self._start = time.monotonic()
        self._next = self._start + (0.2 if self._on_terminal else LINE_EVERY_S)

    def update(self, done: int) -> None:
        """So many of the tokens are there."""
        now = time.monotonic()
        if now < self._next:
            return
        if self._on_terminal:
            self._next = now + 0.2
            print(f"\r{done}/{self._total} tokens", end="", file=self._out, flush=True)
        else:
            self._next = now + LINE_EVERY_S
            print(f"generate tokens={done} total_tokens={self._total} elapsed_s={now - self._start:.0f}", file=self._out, flush=True)

    def close(self) -> None:
        """Clear the line."""
        if self._on_terminal:
            print("\r\033[K", end="", file=self._out, flush=True)
