"""Finished runs as points of a scaling law: from run directories, folders of them, and CSV files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_llm.config.load import load_config
from dist_llm.planning.count import count_params
from dist_llm.report.metrics import read_metrics
from dist_llm.utils.errors import ConfigError

__all__ = ["RunPoint", "find_runs", "is_run", "run_point"]


@dataclass(frozen=True)
class RunPoint:
    """What a finished run says. loss: held out, in nats per token."""

    run: Path
    params: int
    tokens: int
    loss: float


def is_run(path: Path) -> bool:
    """Does this directory hold a run that `train` began?"""
    return (path / "config.resolved.yaml").is_file() and (path / "metrics.jsonl").is_file()


def find_runs(path: Path) -> list[Path]:
    """The run ``path``, or the runs directly in it or in its folder ``runs``.

    Raises:
        ConfigError: there are none.
    """
    if is_run(path):
        return [path]
    found = sorted(child for folder in (path, path / "runs") if folder.is_dir() for child in folder.iterdir() if is_run(child))
    if not found:
        raise ConfigError(
            f"{path} holds no runs (no config.resolved.yaml with metrics.jsonl in it or one level below); `dist-llm train` makes them"
        )
    return found


def run_point(run: Path) -> RunPoint | str:
    """The point of a run, or why it is none: a run counts when it has ended and was evaluated on held-out text there.

    Raises:
        UserError: its files are damaged.
    """
    config = load_config(run / "config.resolved.yaml").config
    records = read_metrics(run / "metrics.jsonl")
    trained = [r for r in records if r["kind"] == "train"]
    if not trained:
        return "it has no steps yet"
    last = trained[-1]
    if last["step"] < config.train.steps:
        return f"it is at step {last['step']} of {config.train.steps}; its learning rate has not come down"
    evals = [r for r in records if r["kind"] == "eval" and r["step"] == last["step"]]
    if not evals:
        return "its last evaluation is missing; start it again with `dist-llm train`"
    loss = evals[-1].get("loss")
    if not isinstance(loss, int | float) or not math.isfinite(loss):
        return f"its held-out loss is {loss!r}"
    tokens = last.get("tokens")
    if not isinstance(tokens, int):
        return f"its last step says {tokens!r} tokens"
    return RunPoint(run, count_params(config.model).total, tokens, float(loss))


def split_sources(sources: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files (taken for CSV) and directories among what was named.

    Raises:
        ConfigError: one does not exist.
    """
    for path in sources:
        if not path.exists():
            raise ConfigError(f"{path} does not exist; plan fit reads a CSV file with params,tokens,loss, or run directories")
    return [p for p in sources if not p.is_dir()], [p for p in sources if p.is_dir()]
