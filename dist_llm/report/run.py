"""A run directory, read back: metrics, events, and whatever else is there. A run that is not finished is a run too."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from dist_llm.report.metrics import read_events, read_metrics
from dist_llm.report.timeline import StepTimeline, read_timelines
from dist_llm.utils.errors import ConfigError, DataError, StorageError

__all__ = ["CheckpointEntry", "RunData", "load_run", "numbers", "summary"]

_MARKS = ("config.resolved.yaml", "metrics.jsonl", "events.jsonl", "results.json", "checkpoints")  # any of these makes a run directory


@dataclass(frozen=True)
class CheckpointEntry:
    """One folder under ``checkpoints/``."""

    name: str
    step: int
    bytes: int
    written: str
    is_complete: bool  # it has its manifest; whether the hashes hold is for the loader to say


@dataclass(frozen=True)
class RunData:
    """What a run directory holds."""

    directory: Path
    name: str
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    timelines: list[StepTimeline] = field(default_factory=list)  # by step; only pipelines have any
    config: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)  # plan.json: the forecast of the newest attempt; older runs have none
    checkpoints: list[CheckpointEntry] = field(default_factory=list)


def _is_run(path: Path) -> bool:
    return any((path / mark).exists() for mark in _MARKS)


def _no_run(run_dir: Path) -> ConfigError:
    # People name a run by its path, by its name, or by a path with a slip in it.
    known: dict[str, Path] = {}
    for parent in dict.fromkeys((run_dir.parent, Path("runs"), run_dir)):
        if parent.is_dir():
            known |= {child.name: child for child in sorted(parent.iterdir()) if child.is_dir() and _is_run(child)}
    near = get_close_matches(run_dir.name, known, n=1) or get_close_matches(run_dir.name, known, n=1, cutoff=0.0)
    hint = f"did you mean {known[near[0]]}?" if near else "`dist-llm train` makes one"
    what = f"none of {', '.join(_MARKS)} is in it" if run_dir.is_dir() else "there is no such directory"
    return ConfigError(f"{run_dir} is not a run directory: {what}; {hint}")


def _read(path: Path, parse: Callable[[str], Any], way_out: str) -> dict[str, Any]:
    # A mapping from a file that need not be there.
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}; check that it is a file this user may read") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is damaged ({reason}); {way_out}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a mapping, not {type(value).__name__}; {way_out}")
    return value


def _checkpoints(folder: Path) -> list[CheckpointEntry]:
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match is None or not path.is_dir():
            continue
        written = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        size = sum(f.stat().st_size for f in path.iterdir() if f.is_file())
        found.append(CheckpointEntry(path.name, int(match[1]), size, written, (path / "manifest.json").is_file()))
    return sorted(found, key=lambda c: c.step)


def load_run(run_dir: Path) -> RunData:
    """Read a run directory, finished or not.

    Raises:
        ConfigError: there is no run there; the nearest run directory is named.
        DataError: a file in it is damaged.
    """
    run_dir = Path(run_dir)
    if not _is_run(run_dir):
        raise _no_run(run_dir)
    records = read_metrics(run_dir / "metrics.jsonl")
    config_path = run_dir / "config.resolved.yaml"
    config = _read(config_path, yaml.safe_load, "`dist-llm config show` writes it again from the run's config")
    return RunData(
        directory=run_dir,
        name=str(config.get("name") or run_dir.resolve().name),
        train=[r for r in records if r["kind"] == "train"],
        evals=[r for r in records if r["kind"] == "eval"],
        events=read_events(run_dir / "events.jsonl"),
        timelines=read_timelines(run_dir / "timeline.jsonl"),
        config=config_path.read_text(encoding="utf-8") if config else "",
        environment=_read(run_dir / "env.json", json.loads, "remove it; the next `dist-llm train` writes it again"),
        results=_read(run_dir / "results.json", json.loads, "remove it, the report is drawn without it; `make quickstart` writes it again"),
        plan=_read(
            run_dir / "plan.json", json.loads, "remove it, the report is drawn without it; the next `dist-llm train` writes it again"
        ),
        checkpoints=_checkpoints(run_dir / "checkpoints"),
    )


def numbers(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one field, of the records that have it."""
    pairs = [
        (r["step"], float(r[name]))
        for r in records
        if isinstance(r.get(name), int | float) and not isinstance(r[name], bool) and math.isfinite(r[name])
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def summary(run: RunData) -> dict[str, Any]:
    """Last step, last training loss, and held-out bits per byte: of the final evaluation if there was one, else the last."""
    evaluated: Any = run.results.get("eval")
    bits = evaluated.get("bits_per_byte") if isinstance(evaluated, dict) else None
    if bits is None and run.evals:
        bits = run.evals[-1].get("bits_per_byte")
    return {
        "steps": run.train[-1]["step"] if run.train else 0,
        "final_loss": run.train[-1].get("loss") if run.train else None,
        "eval_bits_per_byte": bits,
    }
