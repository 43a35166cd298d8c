from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_llm.cluster.exit_file import EXIT_FILE, next_attempt, read_exit, write_exit
from dist_llm.utils.errors import ExitCode, StorageError

DOC = Path(__file__).parents[2] / "docs" / "exit-codes.md"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read_exit(tmp_path) is None
    assert write_exit(
        tmp_path, code=ExitCode.NUMERICAL, reason="loss is nan", rank=3, host="n2", step=17, traceback='File "a"\n  "code": 5', attempt=2
    )
    record = read_exit(tmp_path)
    assert record is not None
    assert (record.code, record.name, record.reason) == (76, "numerical", "loss is nan")
    assert (record.rank, record.host, record.step, record.attempt) == (3, "n2", 17, 2)
    assert record.traceback == 'File "a"\n  "code": 5'


def test_a_shell_finds_the_code_on_one_line(tmp_path: Path) -> None:
    # slurm/train.sbatch reads it with sed: the traceback must not be able to look like the code.
    write_exit(tmp_path, code=75, reason="signal", host="n1", traceback='x\n  "code": 5,\n', attempt=1)
    assert re.findall(r'^  "code": ([0-9]+),?$', (tmp_path / EXIT_FILE).read_text(), re.MULTILINE) == ["75"]


def test_the_first_to_speak_in_an_attempt_is_kept_and_the_next_attempt_replaces_it(tmp_path: Path) -> None:
    assert write_exit(tmp_path, code=1, reason="rank 5 raised", rank=5, host="n2", attempt=1)
    assert not write_exit(tmp_path, code=75, reason="SIGTERM, because rank 5 is gone", rank=0, host="n1", attempt=1)
    record = read_exit(tmp_path)
    assert record is not None and (record.code, record.rank) == (1, 5)
    assert write_exit(tmp_path, code=0, reason="done", rank=0, host="n1", attempt=2)
    record = read_exit(tmp_path)
    assert record is not None and (record.code, record.attempt) == (0, 2)
    assert [p.name for p in tmp_path.iterdir()] == [EXIT_FILE]


def test_a_code_that_is_none_of_ours_is_called_unknown(tmp_path: Path) -> None:
    write_exit(tmp_path, code=139, reason="segmentation fault", host="n1", attempt=1)
    record = read_exit(tmp_path)
    assert record is not None and record.name == "unknown"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"code": "75"}', "\xff"])
def test_a_damaged_record_is_an_error_that_names_the_file_and_is_replaced_by_the_next(tmp_path: Path, text: str) -> None:
    (tmp_path / EXIT_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(StorageError, match=re.escape(str(tmp_path / EXIT_FILE))):
        read_exit(tmp_path)
    assert write_exit(tmp_path, code=0, reason="done", host="n1", attempt=1)
    record = read_exit(tmp_path)
    assert record is not None and record.code == 0


def test_attempts_are_counted_by_their_log_directories(tmp_path: Path) -> None:
    assert next_attempt(tmp_path) == 1
    for name in ("attempt-1", "attempt-2", "attempt-10", "attempt-x", "old"):
        (tmp_path / "logs" / name).mkdir(parents=True)
    (tmp_path / "logs" / "attempt-99").write_text("a file is no attempt")
    assert next_attempt(tmp_path) == 11


def test_a_log_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(StorageError, match="logs"):
        next_attempt(tmp_path)


def test_the_documentation_lists_every_exit_code_and_no_other() -> None:
    rows = re.findall(r"^\| (\d+) \| `([A-Z_]+)` \| (.+) \| (.+) \|$", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    assert [(int(code), name) for code, name, _, _ in rows] == [(int(code), code.name) for code in ExitCode]
    assert all(meaning.strip() and action.strip() for _, _, meaning, action in rows)
