from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_llm.data.index import load_index
from dist_llm.data.prepare import prepare
from dist_llm.data.text import iter_text
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.utils.errors import ConfigError, DataError, StorageError

from .conftest import write_texts


def decoded(corpus: Path) -> dict[str, dict[str, bytes]]:
    return {split: dict(iter_text(corpus, split)) for split in load_index(corpus).splits}


def test_the_corpus_holds_every_document_once_and_unchanged(texts_and_corpus: tuple[dict[str, bytes], Path]) -> None:
    texts, corpus = texts_and_corpus
    splits = decoded(corpus)
    assert {f"texts/{name}": data for name, data in texts.items()} == splits["train"] | splits["val"]
    assert not splits["train"].keys() & splits["val"].keys()
    index = load_index(corpus)
    assert len(index.split("train").shards) > 1
    assert sum(split.documents for split in index.splits.values()) == len(texts)
    assert sum(split.text_bytes for split in index.splits.values()) == sum(map(len, texts.values()))
    assert (index.tokenizer.pad_id, index.tokenizer.unk_id, index.tokenizer.bos_id, index.tokenizer.eos_id) == (0, 1, 2, 3)


def test_the_same_texts_give_the_same_files_wherever_they_are_and_on_any_threads(tmp_path: Path) -> None:
    for place, threads in (("a", 1), ("b", 2)):
        write_texts(tmp_path / place / "texts")
        prepare([str(tmp_path / place / "texts")], tmp_path / place / "out", vocab_size=400, threads=threads)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a" / "out").iterdir() if path.name != "index.json"}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b" / "out").iterdir() if path.name != "index.json"}
    a, b = (load_index(tmp_path / place / "out") for place in "ab")
    assert (a.fingerprint, a.splits, a.tokenizer) == (b.fingerprint, b.splits, b.tokenizer)


def test_a_document_stays_on_its_side_when_others_join(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", count=60)
    prepare([str(tmp_path / "texts")], tmp_path / "all", vocab_size=400, val_fraction=0.3)
    for name in list(texts)[::3]:
        (tmp_path / "texts" / name).unlink()
    prepare([str(tmp_path / "texts")], tmp_path / "some", vocab_size=400, val_fraction=0.3)
    whole, part = decoded(tmp_path / "all"), decoded(tmp_path / "some")
    assert part["val"].items() <= whole["val"].items()
    assert part["train"].items() <= whole["train"].items()


@pytest.mark.parametrize("fraction", [1e-9, 0.02, 0.999])
def test_two_documents_give_one_on_each_side(tmp_path: Path, fraction: float) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.py").write_text("first text")
    (tmp_path / "t" / "b.py").write_text("second text")
    answer = prepare([str(tmp_path / "t")], tmp_path / "out", vocab_size=400, val_fraction=fraction)
    assert [answer["splits"][split]["documents"] for split in ("train", "val")] == [1, 1]


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.999])
def test_a_single_document_is_trained_on(tmp_path: Path, fraction: float) -> None:
    (tmp_path / "a.py").write_text("the only text")
    answer = prepare([str(tmp_path / "a.py")], tmp_path / "out", vocab_size=400, val_fraction=fraction)
    assert [answer["splits"][split]["documents"] for split in ("train", "val")] == [1, 0]


def test_copies_of_a_text_are_never_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for number in range(30):
        (tmp_path / "t" / f"{number}.py").write_text(f"text {number % 10}")
    prepare([str(tmp_path / "t")], tmp_path / "out", vocab_size=400, val_fraction=0.4)
    splits = decoded(tmp_path / "out")
    assert splits["val"]
    assert not set(splits["train"].values()) & set(splits["val"].values())


def test_the_tokenizer_has_seen_the_training_side_only(texts_and_corpus: tuple[dict[str, bytes], Path]) -> None:
    texts, corpus = texts_and_corpus
    found = load_index(corpus).tokenizer.sha256
    assert found == Tokenizer.train([text.decode() for text in decoded(corpus)["train"].values()], vocab_size=400).sha256
    assert found != Tokenizer.train([text.decode() for text in texts.values()], vocab_size=400).sha256


def test_a_given_tokenizer_is_used_and_copied(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "a.txt").write_text("some \u2581 text")
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer_file=corpus / "tokenizer.model")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (corpus / "tokenizer.model").read_bytes()
    assert decoded(tmp_path / "out")["train"] == {"a.txt": "some \u2581 text".encode()}


def test_an_up_to_date_corpus_is_kept_and_another_is_refused_until_forced(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", count=5)
    sources, out = [str(tmp_path / "texts")], tmp_path / "out"
    assert not prepare(sources, out, vocab_size=400)["reused"]
    written = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(sources, out, vocab_size=400)["reused"]
    assert written == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(ConfigError, match=r"other sources or options.*--force"):
        prepare(sources, out, vocab_size=410)
    (tmp_path / "texts" / "file000.py").write_text("changed")
    with pytest.raises(ConfigError, match=r"other sources or options.*--force"):
        prepare(sources, out, vocab_size=400)
    assert written == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not prepare(sources, out, vocab_size=400, force=True)["reused"]
    assert b"changed" in {**decoded(out)["train"], **decoded(out)["val"]}.values()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def test_a_damaged_corpus_is_written_again(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", count=5)
    sources, out = [str(tmp_path / "texts")], tmp_path / "out"
    prepare(sources, out, vocab_size=400)
    shard = out / "train-000000.tar"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + b"x")
    assert not prepare(sources, out, vocab_size=400)["reused"]
    assert shard.read_bytes() == good
    (out / "index.json").write_text("{")
    with pytest.raises(DataError, match="--force"):
        prepare(sources, out, vocab_size=400)
    prepare(sources, out, vocab_size=400, force=True)
    assert load_index(out)


def test_a_directory_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", count=3)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("ten years of work")
    (out / "index.json").write_text("{}")
    for force in (False, True):
        with pytest.raises(ConfigError, match=r"not of a corpus \(thesis\.tex\)"):
            prepare([str(tmp_path / "texts")], out, vocab_size=400, force=force)
    assert (out / "thesis.tex").read_text() == "ten years of work"


def test_an_output_inside_a_source_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", count=3)
    with pytest.raises(ConfigError, match="lies inside --source"):
        prepare([str(tmp_path / "texts")], tmp_path / "texts" / "out", vocab_size=400)
    assert not (tmp_path / "texts" / "out").exists()


def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        prepare([str(tmp_path / "empty.txt")], tmp_path / "out", vocab_size=400)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_invalid_utf8_in_the_last_file_leaves_nothing(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", count=3)
    (tmp_path / "texts" / "z.py").write_bytes(b"ok \xe9")
    with pytest.raises(DataError, match=r"z\.py is not UTF-8: byte 0xE9 at offset 3"):
        prepare([str(tmp_path / "texts")], tmp_path / "out", vocab_size=400)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]
    assert prepare([str(tmp_path / "texts")], tmp_path / "out", vocab_size=400, invalid_utf8="skip")["documents"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 10}, "--vocab-size 10 is too small"),
        ({"val_fraction": 1.0}, "--val-fraction 1.0"),
        ({"shard_bytes": 0}, "must be positive"),
        ({"threads": 0}, "--threads 0"),
        ({"vocab_size": 400, "tokenizer_file": "x"}, "not both"),
    ],
)
def test_an_option_out_of_range_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=message):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", **options)  # type: ignore[arg-type]


def test_a_disk_that_refuses_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    # The real refusal, without filling a disk: the kernel lets this process write no file beyond 64 KiB.
    write_texts(tmp_path / "texts", count=60)
    command = [
        sys.executable,
        "-m",
        "dist_llm",
        "data",
        "prepare",
        "--source",
        str(tmp_path / "texts"),
        "--out",
        str(tmp_path / "out"),
        "--vocab-size",
        "400",
    ]
    limit = 64 << 10
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert done.returncode == StorageError.exit_code == 74, done.stderr
    assert "cannot write the corpus" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_preparation_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    # Shards take two seconds to write. On a busy machine this test can sleep through them: that was no interruption, and is tried again.
    for attempt in range(3):
        out = tmp_path / f"out{attempt}"
        command = [sys.executable, "-m", "dist_llm", "data", "prepare", "--source", "stdlib", "--out", str(out)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while not list(tmp_path.glob(f".{out.name}.*.partial/tokenizer.model")):  # now it is writing shards
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
            _, messages = process.communicate(timeout=30)
        if process.returncode != 0:
            break
        shutil.rmtree(out)
    assert process.returncode == 130
    assert "Traceback" not in messages
    assert list(tmp_path.iterdir()) == []


def test_the_command_answers_in_json(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", count=5)
    command = [
        sys.executable,
        "-m",
        "dist_llm",
        "data",
        "prepare",
        "--source",
        str(tmp_path / "texts"),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert (answer["documents"], answer["shards"], answer["tokenizer"]) == (5, 2, str(tmp_path / "out" / "tokenizer.model"))
    assert answer["tokens"] == sum(split["tokens"] for split in answer["splits"].values())
    assert "vocabulary of" in done.stderr
