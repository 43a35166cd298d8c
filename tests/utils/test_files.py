from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dist_llm.utils.errors import ExitCode, StorageError
from dist_llm.utils.files import fsync_dir, sha256_bytes, sha256_file, write_atomic, write_json


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"\x00\xff", b"", b"more"):
        write_atomic(path, data)
        assert path.read_bytes() == data
    write_atomic(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert names(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    program = (
        "import sys; from pathlib import Path; from dist_llm.utils.files import write_atomic; write_atomic(Path(sys.argv[1]), 'x' * 5000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert f"StorageError: cannot write {path}: File too large; free some space" in done.stderr
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_target_that_cannot_be_replaced_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*/folder: Is a directory") as caught:
        write_atomic(tmp_path / "folder", "x")
    assert caught.value.exit_code == ExitCode.IO
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_is_missing_or_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot write .*/absent/f: No such file or directory"):
        write_atomic(tmp_path / "absent" / "f", "x")
    with pytest.raises(StorageError, match=r"cannot write .*/file/f: Not a directory"):
        write_atomic(tmp_path / "file" / "f", "x")


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def interrupted(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_json_is_sorted_and_ends_with_a_line(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", {"b": [1, None], "a": "é"})
    text = (tmp_path / "f.json").read_text()
    assert json.loads(text) == {"a": "é", "b": [1, None]}
    assert text.index('"a"') < text.index('"b"')
    assert text.endswith("}\n")


def test_hashes_are_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
    assert sha256_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_syncing_a_directory_leaks_no_descriptor(tmp_path: Path) -> None:
    before = len(names(Path("/proc/self/fd")))
    for _ in range(20):
        fsync_dir(tmp_path)
    assert len(names(Path("/proc/self/fd"))) == before
    with pytest.raises(FileNotFoundError):
        fsync_dir(tmp_path / "absent")
