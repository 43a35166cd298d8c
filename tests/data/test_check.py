from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_llm.cli.main import main
from dist_llm.data.check import check
from dist_llm.data.index import load_index
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.utils.errors import DataError

SHARD = "train-000001.tar"


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "copy"))


def edit_index(copy: Path, change: Callable[[dict], None]) -> None:
    value = json.loads((copy / "index.json").read_text())
    change(value)
    (copy / "index.json").write_text(json.dumps(value))


def flip(copy: Path, at: int) -> None:
    data = bytearray((copy / SHARD).read_bytes())
    data[at] ^= 1
    (copy / SHARD).write_bytes(data)


def test_a_fresh_corpus_has_no_problems(corpus: Path) -> None:
    assert check(corpus) == []


def first_tokens_at(copy: Path) -> int:
    """Offset of a token of the shard's first document: header, description, header, array header."""
    data = (copy / SHARD).read_bytes()
    return data.index(b"\x93NUMPY") + 128


DAMAGES: list[tuple[str, Callable[[Path], None], str, str]] = [
    ("missing", lambda c: (c / SHARD).unlink(), SHARD, "is missing"),
    ("truncated", lambda c: (c / SHARD).write_bytes((c / SHARD).read_bytes()[:-1]), SHARD, "is truncated"),
    ("hash", lambda c: flip(c, first_tokens_at(c)), SHARD, "is damaged: its sha256"),
    ("hash", lambda c: (c / SHARD).write_bytes((c / SHARD).read_bytes() + b"\0"), SHARD, "bytes long"),
    ("member", lambda c: flip(c, first_tokens_at(c)), SHARD, "does not decode to the text|ends at"),
    ("member", lambda c: flip(c, 0), SHARD, "tar header at offset 0"),
    ("unlisted", lambda c: shutil.copy(c / SHARD, c / "train-000999.tar") and None, "train-000999.tar", "not in index.json"),
    ("tokenizer", lambda c: (c / "tokenizer.model").unlink(), "tokenizer.model", "is missing"),
    ("tokenizer", lambda c: (c / "tokenizer.model").write_bytes(b"x"), "tokenizer.model", "does not match the shards"),
    (
        "tokenizer",
        lambda c: edit_index(c, lambda v: v["tokenizer"].update(bos_id=7)),
        "tokenizer.model",
        "bos_id of .* is 2, the index says 7",
    ),
    ("index", lambda c: (c / "index.json").write_text('{"version": 1'), "index.json", "is not JSON"),
    ("index", lambda c: (c / "index.json").unlink(), "index.json", "not a prepared corpus"),
    ("index", lambda c: edit_index(c, lambda v: v.update(version=99)), "index.json", "format version 99"),
    ("index", lambda c: edit_index(c, lambda v: v["tokenizer"].update(file="../../etc/passwd")), "index.json", "not a plain file name"),
    (
        "index",
        lambda c: edit_index(c, lambda v: v["splits"]["val"].pop("tokens")),
        "index.json",
        r"splits\.val\.tokens must be of type int",
    ),
    ("index", lambda c: edit_index(c, lambda v: v["splits"]["train"]["shards"][0].update(size=-1)), "index.json", "cannot be negative"),
    ("count", lambda c: edit_index(c, lambda v: v["splits"]["train"].update(documents=1)), "index.json", "add up to"),
    ("count", lambda c: edit_index(c, lambda v: v["splits"]["train"]["shards"][1].update(text_bytes=5)), SHARD, "the index says 5"),
]


@pytest.mark.parametrize(("kind", "damage", "shard", "message"), DAMAGES, ids=[f"{d[0]}-{n}" for n, d in enumerate(DAMAGES)])
def test_each_damage_is_found_and_named(copy: Path, kind: str, damage: Callable[[Path], None], shard: str, message: str) -> None:
    damage(copy)
    found = check(copy)
    assert [p for p in found if p.kind == kind and p.shard == shard and re.search(message, p.message)], found


def test_a_tokenizer_of_the_same_size_that_the_index_was_made_to_accept_is_found(copy: Path) -> None:
    other = Tokenizer.train(["quite another text with other words in it " * 50], vocab_size=400)
    (copy / "tokenizer.model").write_bytes(other.model)
    edit_index(copy, lambda v: v["tokenizer"].update(sha256=other.sha256, vocab_size=400))
    assert {p.kind for p in check(copy)} >= {"member"}


def test_loading_refuses_a_tokenizer_that_does_not_match(copy: Path) -> None:
    Tokenizer.train(["abc"], vocab_size=400, out=copy / "tokenizer.model")
    with pytest.raises(DataError, match=r"tokenizer\.model does not match the shards"):
        load_index(copy)


def test_loading_a_directory_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no corpus at .*nowhere; write one with `dist-llm data prepare"):
        load_index(tmp_path / "nowhere")


def test_the_command_answers_in_json_with_exit_65(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "problems": []}
    (copy / SHARD).unlink()
    assert main(["data", "check", str(copy), "--json"]) == 65
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "ok": False,
        "problems": [{"shard": SHARD, "kind": "missing", "message": f"shard {copy / SHARD} is missing"}],
    }
    assert "is missing" in err


def test_show_prints_decoded_documents(texts_and_corpus: tuple[dict[str, bytes], Path], capsys: pytest.CaptureFixture[str]) -> None:
    texts, corpus = texts_and_corpus
    assert main(["data", "show", str(corpus), "--split", "val", "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("--- texts/file") == 2
    name = out.split()[1].removeprefix("texts/")
    assert texts[name].decode()[:200] in out
    assert main(["data", "show", str(corpus), "--split", "test"]) == 65
    assert "no split 'test'; it has train, val" in capsys.readouterr().err


def test_a_text_of_the_right_length_but_other_content_is_found(copy: Path) -> None:
    data = (copy / SHARD).read_bytes()
    at = data.index(b'"sha256": "') + len(b'"sha256": "')
    other = b"0" if data[at : at + 1] != b"0" else b"1"
    (copy / SHARD).write_bytes(data[:at] + other + data[at + 1 :])
    (member,) = [p for p in check(copy) if p.kind == "member"]
    assert "does not decode to the text it was made from" in member.message
