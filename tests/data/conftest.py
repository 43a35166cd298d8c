from __future__ import annotations

import random
from pathlib import Path

import pytest

from dist_llm.data.prepare import prepare

WORDS = [
    "def",
    "return",
    "self",
    "value",
    "for",
    "in",
    "range",
    "print",
    "(",
    ")",
    ":",
    "=",
    "été",
    "日本",
    "▁",
    "0",
    "1",
    "27",
    "tokens",
    "",
    "",
    "\t",
]


def write_texts(folder: Path, *, count: int = 40, seed: int = 0) -> dict[str, bytes]:
    """Some source-like files of different lengths, names to bytes."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    texts = {}
    for number in range(count):
        lines = ["    " * rng.randrange(4) + " ".join(rng.choices(WORDS, k=rng.randrange(1, 12))) for _ in range(rng.randrange(1, 30))]
        texts[f"file{number:03d}.py"] = ("\n".join(lines) + f"\n# {number}").encode()
    for name, data in texts.items():
        (folder / name).write_bytes(data)
    return texts


@pytest.fixture(scope="session")
def texts_and_corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Path]:
    """Forty files and the corpus made of them, in several shards. Never to be written to."""
    root = tmp_path_factory.mktemp("corpus")
    texts = write_texts(root / "texts")
    prepare([str(root / "texts")], root / "out", vocab_size=400, val_fraction=0.2, shard_bytes=20_000)
    return texts, root / "out"


@pytest.fixture
def corpus(texts_and_corpus: tuple[dict[str, bytes], Path]) -> Path:
    return texts_and_corpus[1]
