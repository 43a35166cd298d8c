from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.data.tokenizer import Tokenizer
from dist_llm.generate.stream import StepProgress, TextStream
from dist_llm.generate.vocabulary import vocabulary_of


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the quick brown fox, été, jumps over the lazy dog\n" * 20], vocab_size=330)


class Pieces(io.StringIO):
    """Remembers what each write brought."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> Pieces:
    out = Pieces()
    stream = TextStream(tokenizer, out)
    for token in tokens:
        stream.write(token)
    stream.close()
    return out


def test_a_character_of_several_tokens_is_written_once_it_is_whole(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the \U0001f600\u65e5").tolist()
    out = streamed(tokenizer, tokens)
    assert out.getvalue() == "the \U0001f600\u65e5"
    assert out.pieces[-2:] == ["\U0001f600", "\u65e5"]
    assert len(tokens) >= len(out.pieces) + 3 + 2, "seven byte tokens made two characters"


@given(st.data())
def test_streamed_text_is_the_text_of_all_tokens_together(tokenizer: Tokenizer, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert streamed(tokenizer, tokens).getvalue() == tokenizer.decode(tokens)


def test_what_stands_for_no_text_cannot_be_written_except_the_end(tokenizer: Tokenizer) -> None:
    allowed = vocabulary_of(tokenizer, tokenizer.vocab_size + 9, "cpu").allowed  # type: ignore[arg-type]
    assert not allowed[[tokenizer.pad_id, tokenizer.bos_id, tokenizer.unk_id]].any()
    assert allowed[tokenizer.eos_id]
    assert not allowed[tokenizer.vocab_size :].any()
    assert int(allowed.sum()) == tokenizer.vocab_size - 3


def test_a_tokenizer_that_pads_with_its_end_token_can_still_end(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "pad_id", tokenizer.eos_id)
    assert vocabulary_of(tokenizer, tokenizer.vocab_size, "cpu").allowed[tokenizer.eos_id]  # type: ignore[arg-type]


def test_progress_is_a_line_of_key_and_value_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with open(tmp_path / "out", "w+") as out:
        progress = StepProgress(50, out)
        for done in range(1, 13):
            now[0] += 1
            progress.update(done)
        progress.close()
        out.seek(0)
        assert out.read() == "generate tokens=5 total_tokens=50 elapsed_s=5\ngenerate tokens=10 total_tokens=50 elapsed_s=10\n"
