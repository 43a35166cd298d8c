from __future__ import annotations

import lzma
import math
import random

import pytest

from dist_llm.evaluate.baselines import byte_unigram_entropy, lzma_bits_per_byte


def test_all_bytes_alike_often_carry_eight_bits_and_one_symbol_none() -> None:
    assert byte_unigram_entropy(bytes(range(256)) * 3) == pytest.approx(8, rel=1e-12)
    assert byte_unigram_entropy(b"a" * 1000) == 0
    assert byte_unigram_entropy(b"\x00") == 0


def test_entropy_of_known_frequencies() -> None:
    assert byte_unigram_entropy(b"aaab") == pytest.approx(2 - 0.75 * math.log2(3), rel=1e-12)
    assert byte_unigram_entropy(b"abcd" * 5) == pytest.approx(2, rel=1e-12)
    assert byte_unigram_entropy("é".encode() * 7) == pytest.approx(1, rel=1e-12)  # two bytes, not one letter


def test_entropy_knows_no_order_and_no_code_beats_it_without_one() -> None:
    data = bytearray(b"the quick brown fox jumps over the lazy dog " * 500)
    entropy = byte_unigram_entropy(bytes(data))
    random.Random(1).shuffle(data)
    assert byte_unigram_entropy(bytes(data)) == pytest.approx(entropy, rel=1e-12)
    assert lzma_bits_per_byte(bytes(data)) > entropy


def test_lzma_figure_is_the_length_of_what_lzma_writes_at_its_best() -> None:
    rng = random.Random(3)
    words = [rng.randbytes(rng.randrange(2, 9)).hex() for _ in range(300)]
    data = " ".join(rng.choices(words, k=5000)).encode()
    assert lzma_bits_per_byte(data) == 8 * len(lzma.compress(data, preset=9)) / len(data)
    assert len(lzma.compress(data, preset=9)) < len(lzma.compress(data, preset=0)), "text on which the preset matters"
    assert lzma_bits_per_byte(data) < 4 < 8 < lzma_bits_per_byte(rng.randbytes(5000))


@pytest.mark.parametrize(
    ("figure", "message"), [(byte_unigram_entropy, "entropy of no bytes"), (lzma_bits_per_byte, "compression of no bytes")]
)
def test_no_bytes_are_refused(figure, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figure(b"")
