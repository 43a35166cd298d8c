from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_llm.data import progress

from .conftest import write_texts


def test_elsewhere_than_on_a_terminal_a_line_of_pairs_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    report = progress.ConsoleProgress()
    report.phase("encode", 200)
    report.update(100)
    report.note("a note")
    report.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["phase=encode done_bytes=100 total_bytes=200 elapsed_s=0", "a note"]


def test_on_a_terminal_there_is_a_bar_and_the_answer_stays_on_stdout(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", count=3)
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
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env={**os.environ, "TERM": "xterm"})
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0, shown
    assert done.stdout.startswith('{"documents": 3')
    assert "encode" in shown
    assert "\x1b[" in shown
