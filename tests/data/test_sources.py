from __future__ import annotations

import io
import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.data import cut
from dist_llm.data.sources import Document, Source, Tally, open_source, read_documents
from dist_llm.utils.errors import DataError, ExitCode


def read(source: Source) -> tuple[list[Document], Tally]:
    tally = Tally()
    return list(read_documents(source, tally)), tally


def test_a_folder_is_read_in_the_order_of_names_and_only_its_texts(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.txt", "a/a.md", "c.bin", ".hidden/x.py", "__pycache__/y.py", "empty.txt"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text("" if name.startswith("empty") else name)
    documents, tally = read(open_source(str(tmp_path / "src")))
    assert [d.name for d in documents] == ["src/a/a.md", "src/a/z.txt", "src/b.py"]
    assert (tally.documents, tally.empty) == (3, 1)


def test_a_file_is_one_document_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "x.unknown").write_bytes(b"one\r\n\r\ntwo\r")
    documents, _ = read(open_source(str(tmp_path / "x.unknown")))
    assert documents == [Document("x.unknown", "one\r\n\r\ntwo\r")]


def test_a_large_text_is_cut_at_blank_lines_and_says_so(tmp_path: Path) -> None:
    text = "".join(f"paragraph {n} " + "word " * (n % 90) + "\n\n" for n in range(6000))
    (tmp_path / "book.txt").write_text(text)
    assert len(text) > 1 << 20
    documents, tally = read(open_source(str(tmp_path / "book.txt")))
    assert "".join(d.text for d in documents) == text
    assert all(8 << 10 <= len(d.text) <= 16 << 10 and d.text.endswith("\n\n") for d in documents[:-1])
    assert tally.messages() == [f"book.txt is one large text: cut at blank lines into {len(documents)} documents"]


def test_large_code_stays_one_document(tmp_path: Path) -> None:
    (tmp_path / "big.py").write_text("x = 1\n\n" * 200_000)
    assert len(read(open_source(str(tmp_path / "big.py")))[0]) == 1


@given(st.lists(st.sampled_from(["\n", " \r\n", "x" * 9000, "word\n", "\u65e5" * 40 + "\n", "\U0001f600" * 30, "a"]), max_size=60))
def test_pieces_of_any_text_put_together_are_the_text(parts: list[str]) -> None:
    data = "".join(parts).encode()
    pieces = list(cut.cut_at_blank_lines(io.BytesIO(data)))
    assert b"".join(pieces) == data
    for piece in pieces:
        piece.decode("utf-8")


@pytest.mark.parametrize("char", ["a", "\u00e9", "\u65e5", "\U0001f600"])
@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_a_line_too_long_for_memory_is_cut_between_characters(char: str, shift: int) -> None:
    data = ("x" * shift + char * (3 * cut.MAX_LINE_BYTES // len(char.encode()))).encode()
    pieces = list(cut.cut_at_blank_lines(io.BytesIO(data)))
    assert b"".join(pieces) == data
    assert len(pieces) >= 3
    for piece in pieces:
        piece.decode("utf-8")


def test_jsonl_gives_a_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"body": "one\ntwo \u65e5"}) + "\n\n" + json.dumps({"body": "three"}) + "\n")
    documents, _ = read(open_source(str(path), text_key="body"))
    assert documents == [Document("chat.jsonl:1", "one\ntwo \u65e5"), Document("chat.jsonl:3", "three")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', "line 2: 'text' is not a string but int"),
        ('{"body": "x"}', r"line 2 has no key 'text' \(its keys: body\); .* --text-key"),
        ("[1]", "line 2 is not an object but list"),
        ("{oops", "line 2 is not JSON"),
        ('{"text": "a\\ud800"}', "line 2: character 1 of 'text' is a lone surrogate"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read(open_source(str(path)))


@pytest.mark.parametrize("name", ["a.py", "a.jsonl"])
def test_invalid_utf8_is_refused_with_file_and_offset(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "fine"}\n' + b"ab\xffcd\n")
    with pytest.raises(DataError, match=rf"{name} is not UTF-8: byte 0xFF at offset 19 .* --invalid-utf8 skip") as caught:
        read(open_source(str(tmp_path / name)))
    assert caught.value.exit_code == ExitCode.DATA == 65


def test_invalid_utf8_in_a_large_text_has_the_offset_in_the_file(tmp_path: Path) -> None:
    good = b"line of text\n\n" * 100_000
    (tmp_path / "big.txt").write_bytes(good + b"\xc3(")
    with pytest.raises(DataError, match=f"offset {len(good)} "):
        read(open_source(str(tmp_path / "big.txt")))


def test_invalid_utf8_can_be_skipped_and_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\xff")
    (tmp_path / "b.py").write_bytes(b"fine")
    documents, tally = read(open_source(str(tmp_path), invalid_utf8="skip"))
    assert [d.text for d in documents] == ["fine"]
    assert tally.messages() == [f"skipped 1 that are not UTF-8: {tmp_path.name}/a.py"]


def test_a_missing_path_and_a_folder_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; .*stdlib"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds no text file"):
        open_source(str(tmp_path))


def test_stdlib_is_this_pythons_library_without_installed_packages() -> None:
    source = open_source("stdlib")
    names = [file.name for file in source.files]
    assert "stdlib/json/__init__.py" in names
    assert names == sorted(names)
    assert not [name for name in names if "/test/" in name or "/tests/" in name]
    assert not [name for name in names if "site-packages" in name or "dist-packages" in name or "__pycache__" in name]


def test_the_test_suites_of_the_library_are_a_source_of_their_own() -> None:
    folder = Path(sysconfig.get_path("stdlib"), "test")
    if not (folder / "test_json").is_dir():
        pytest.skip("this Python was installed without its test suites")
    tests = {file.name for file in open_source("stdlib-tests").files}
    assert "stdlib/test/test_json/__init__.py" in tests
    assert tests.isdisjoint(file.name for file in open_source("stdlib").files)
