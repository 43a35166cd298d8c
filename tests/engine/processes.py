"""Training as a person starts it: a process of its own, watched through its run directory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import BIN, ROOT, clean_environment

DEADLINE_S = 120


def records(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl of one kind."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def numbers(run_dir: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step, digit for digit."""
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(run_dir)]


def rank_pids(run_dir: Path) -> list[int]:
    """Processes of the newest attempt, by rank, from the first line of their logs."""
    newest = max((run_dir / "logs").glob("attempt-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))
    return [int(log.read_text(encoding="utf-8").splitlines()[0].rsplit(" ", 1)[1]) for log in sorted(newest.glob("rank-*.log"))]


def train_command(*words: object) -> list[str]:
    """One rank, no launcher."""
    return [sys.executable, "-m", "dist_llm", "train", *map(str, words)]


def free_port() -> str:
    """A port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launched(*words: object, launcher: str = "deepspeed", ranks: int = 2) -> list[str]:
    """Ranks under a launcher."""
    port = free_port()
    if launcher == "deepspeed":
        head = [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port, "--module", "dist_llm"]
    else:
        head = [str(BIN / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", port, "-m", "dist_llm"]
    return [*head, "train", *map(str, words)]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start in a process group of its own, as a terminal would."""
    with open(log, "ab") as f:
        return subprocess.Popen(command, stdout=f, stderr=f, cwd=ROOT, env=clean_environment(), start_new_session=True)


def finish(process: subprocess.Popen[bytes], log: Path) -> int:
    """Wait for the end; the exit code."""
    try:
        return process.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"still running after {DEADLINE_S} s:\n{log.read_text(encoding='utf-8')[-3000:]}") from None


def complete(command: list[str], log: Path) -> int:
    """Start and wait."""
    return finish(start(command, log), log)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Poll quickly: the interesting moment lasts milliseconds."""
    stop = time.monotonic() + DEADLINE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > stop:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"ended or hung too early ({process.returncode}):\n{log.read_text(encoding='utf-8')[-3000:]}")
        time.sleep(0.002)
