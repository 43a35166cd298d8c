from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer
from dist_llm.utils.errors import ConfigError, DataError

TEXTS = ["def f(self):\n    return  self.x\n\n\tfor i in range(10):\n        print(i)\n" * 20, "caf\u00e9 \u65e5\u672c\u8a9e\r\n" * 9]
TOKENIZER = Tokenizer.train(TEXTS, vocab_size=420)
TRICKY = [
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<0x0A>",
    "\u2581",
    "\0",
    " ",
    "\n",
    "\n    ",
    "\t",
    "\r",
    "\x01",
    "\ufffd",
    "\ufeff",
    "\u2585",
    "\u2047",
    "self",
    "\u65e5",
    "\U0010ffff",
]


@given(st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(TRICKY), st.text(max_size=3))).map("".join)))
def test_every_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode_bytes(ids) == text.encode()
    assert not set(ids.tolist()) & {BOS_ID, EOS_ID, PAD_ID, UNK_ID}


@pytest.mark.parametrize("text", [*TRICKY, "a\u2581b \u2581 \u2581\u2581"])
def test_plain_sentencepiece_reads_our_ids(text: str) -> None:
    plain = sentencepiece.SentencePieceProcessor(model_proto=TOKENIZER.model)
    assert plain.decode(TOKENIZER.encode(text).tolist()) == text


def test_special_ids_are_fixed() -> None:
    assert (TOKENIZER.pad_id, TOKENIZER.unk_id, TOKENIZER.bos_id, TOKENIZER.eos_id) == (0, 1, 2, 3)
    assert TOKENIZER.decode([0, 1, 2, 3]) == ""


def test_a_batch_equals_single_texts_on_any_threads() -> None:
    texts = ["a", "", "x\u2581y", "def f(self):\n    return"]
    for threads in (1, 2):
        for together, text in zip(TOKENIZER.encode_batch(texts, threads=threads), texts, strict=True):
            assert together.dtype == np.uint16
            np.testing.assert_array_equal(together, TOKENIZER.encode(text))


def test_training_depends_on_the_text_and_not_on_its_order(tmp_path: Path) -> None:
    again = Tokenizer.train(reversed(TEXTS), vocab_size=420, out=tmp_path / "t.model")
    assert again.sha256 == TOKENIZER.sha256 == hashlib.sha256((tmp_path / "t.model").read_bytes()).hexdigest()
    assert Tokenizer.train(TEXTS[:1], vocab_size=420).sha256 != TOKENIZER.sha256


def test_an_indented_line_start_is_one_token() -> None:
    assert len(TOKENIZER.encode("\n        ")) == 1


def test_a_space_stays_a_space_when_the_training_text_has_none() -> None:
    tokenizer = Tokenizer.train(["abc"], vocab_size=400)
    assert tokenizer.decode(tokenizer.encode("a b\u2581c")) == "a b\u2581c"


def test_a_text_of_many_characters_fits_a_small_vocabulary() -> None:
    text = "".join(map(chr, range(0x4E00, 0x5E00)))
    tokenizer = Tokenizer.train([text], vocab_size=400)
    assert tokenizer.vocab_size <= 400
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_large_vocabulary_is_stored_in_32_bits() -> None:
    from dist_llm.data.tokenizer import token_dtype

    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(DataError, match=r"character 2 .* U\+D800"):
        TOKENIZER.encode("ab\ud800")


def test_a_model_cut_within_a_character_decodes_to_the_replacement_character() -> None:
    ids = TOKENIZER.encode("\U0001f600")
    assert TOKENIZER.decode(ids[:-1]) == "\ufffd"


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match=f"token {TOKENIZER.vocab_size} is not in the vocabulary"):
        TOKENIZER.decode([TOKENIZER.vocab_size])


@pytest.mark.parametrize(
    "settings",
    [{"normalization_rule_name": "nmt_nfkc"}, {"add_dummy_prefix": True}, {"remove_extra_whitespaces": True}, {"byte_fallback": False}],
)
def test_a_lossy_tokenizer_is_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    lossless = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False, "byte_fallback": True}
    for case, is_refused in (({**lossless, **settings}, True), (lossless, False)):
        model = io.BytesIO()
        lines = iter([line for text in TEXTS for line in text.splitlines()])
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=400, model_type="bpe", hard_vocab_limit=False, minloglevel=2, **case
        )
        path = tmp_path / "foreign.model"
        path.write_bytes(model.getvalue())
        if is_refused:
            with pytest.raises(DataError, match=r"foreign\.model (is not lossless|has no byte pieces)"):
                Tokenizer.load(path)
        else:
            assert Tokenizer.load(path).decode(Tokenizer.load(path).encode("\t x\n")) == "\t x\n"


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    path.write_bytes(b"no model at all")
    with pytest.raises(DataError, match="is not a sentencepiece model"):
        Tokenizer.load(path)
    with pytest.raises(DataError, match=r"missing\.model: No such file"):
        Tokenizer.load(tmp_path / "missing.model")


def test_no_text_and_no_room_are_refused() -> None:
    with pytest.raises(DataError, match="no text to train"):
        Tokenizer.train(["\n \n", ""], vocab_size=400)
    with pytest.raises(ConfigError, match="vocabulary size 300 is too small"):
        Tokenizer.train(TEXTS, vocab_size=300)
