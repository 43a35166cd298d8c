"""The console: lines where they can be read later, a bar where someone is looking."""

from __future__ import annotations

import io
import os
import pty
import re
import threading
from typing import Any

import pytest

from dist_llm.report.console import Console, duration, key_values


def _record(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 12345.6, "step_s": 0.5, "mfu": None, **more}


def _steps(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"^train step=(\d+) ", text, flags=re.MULTILINE)]


def test_lines_come_for_the_first_the_last_and_every_nth_step() -> None:
    out = io.StringIO()
    console = Console(total_steps=25, every=10, stream=out)
    for step in range(1, 26):
        console.step(_record(step))
    console.close()
    assert _steps(out.getvalue()) == [1, 10, 20, 25]


def test_a_resumed_run_shows_its_first_step_and_a_stopped_one_its_last() -> None:
    out = io.StringIO()
    console = Console(total_steps=100, every=10, stream=out)
    for step in range(13, 18):
        console.step(_record(step))
    console.close()
    assert _steps(out.getvalue()) == [13, 17]


def test_a_line_is_pairs_of_key_and_value_without_unknown_numbers() -> None:
    out = io.StringIO()
    console = Console(total_steps=100, every=1, stream=out)
    console.step(_record(1))
    first, *pairs = out.getvalue().split()
    assert first == "train"
    assert dict(p.split("=") for p in pairs) == {
        "step": "1", "loss": "2.5000", "lr": "1.000e-03", "tokens_per_s": "12346", "step_s": "0.5000", "total_steps": "100", "eta": "50s"
    }  # fmt: skip


def test_evaluations_and_notes_are_always_shown() -> None:
    out = io.StringIO()
    console = Console(total_steps=100, every=50, stream=out)
    console.step(_record(1))
    console.step({"kind": "eval", "step": 7, "loss": 2.0, "bits_per_byte": 1.25, "bytes": 99})
    console.note("checkpoint at step 7")
    assert out.getvalue().splitlines()[1:] == ["eval step=7 loss=2.0000 bits_per_byte=1.2500 bytes=99", "checkpoint at step 7"]


def test_a_loss_that_is_not_a_number_is_shown_as_such() -> None:
    assert (
        key_values({"kind": "train", "step": 1, "loss": float("nan"), "grad_norm": float("inf")}) == "train step=1 loss=nan grad_norm=inf"
    )


def _on_terminal(monkeypatch: pytest.MonkeyPatch, term: str) -> str:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "120")
    master, slave = pty.openpty()
    shown: list[bytes] = []

    def watch() -> None:
        while True:
            try:
                shown.append(os.read(master, 4096))
            except OSError:  # EIO: the other end is closed and everything has been read
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    with os.fdopen(slave, "w") as stream:
        console = Console(total_steps=20, every=10, stream=stream)
        for step in range(1, 21):
            console.step(_record(step, bits_per_byte=1.75))
        console.note("saved [step] 20")
        console.close()
    watcher.join(timeout=10)
    os.close(master)
    return b"".join(shown).decode()


def test_a_terminal_gets_one_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _on_terminal(monkeypatch, "xterm")
    assert "train step=" not in text
    for part in ("step 1/20", "step 20/20", "loss 2.5000", "1.750 bits/byte", "12,346 tokens/s", "eta 0s", "saved [step] 20"):
        assert part in text, text


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _steps(_on_terminal(monkeypatch, "dumb").replace("\r\n", "\n")) == [1, 10, 20]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599, "59m59s"), (7380, "2h03m"), (273600, "3d04h")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
