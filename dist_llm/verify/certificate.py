"""The result of a verification for people (a table) and for programs (JSON, certificate.json)."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from dist_llm.config.schema import RunConfig
from dist_llm.config.write import config_hash
from dist_llm.engine.run_dir import versions
from dist_llm.utils.files import write_json
from dist_llm.verify.run import Outcome, Verification

__all__ = ["HEADER", "as_dict", "outcome_lines", "summary_lines", "write_certificate"]

_NAME = 26
HEADER = f"{'layout':<{_NAME}} {'verdict':<8} {'loss':>8} {'norm':>8} {'gradient':>8} {'weight':>8}  worst tensor"


def outcome_lines(outcome: Outcome, tolerance: float) -> str:
    """One row of the table; below it, when the layout does not hold, what differs first."""
    name = outcome.layout.name
    if outcome.difference is None:
        text = (outcome.error or "").strip()
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        return f"{name:<{_NAME}} {'BROKEN':<8}\n{indented}"
    d = outcome.difference
    verdict = "same" if outcome.holds(tolerance) else "DIFFERS"
    worst = f"weight {d.weight_of}" if d.weight > d.gradient else d.gradient_of
    row = f"{name:<{_NAME}} {verdict:<8} {d.loss:>8.1e} {d.grad_norm:>8.1e} {d.gradient:>8.1e} {d.weight:>8.1e}  {worst}"
    return row if outcome.holds(tolerance) else f"{row}\n    differs first: {d.first}"


def summary_lines(result: Verification) -> str:
    """Refused layouts with their reasons, and the verdict."""
    lines = [f"{layout.name:<{_NAME}} refused  {reason}" for layout, reason in result.refused]
    same = sum(outcome.holds(result.tolerance) for outcome in result.outcomes)
    words = f"{same} of {len(result.outcomes)} layouts compute what one process computes, within {result.tolerance:g}"
    if result.refused:
        words += f"; {len(result.refused)} cannot be had with this config"
    return "\n".join([*lines, words])


def as_dict(result: Verification) -> dict[str, Any]:
    """The answer of ``verify --json``."""
    return {
        "ok": result.ok,
        "precision": result.config.precision,
        "tolerance": result.tolerance,
        "layouts": [_outcome(outcome, result.tolerance) for outcome in result.outcomes],
        "refused": [{"layout": layout.name, "reason": reason} for layout, reason in result.refused],
    }


def write_certificate(path: Path, result: Verification, config: RunConfig, *, seconds: float) -> None:
    """Write what was compared, with which code, and every figure.

    Raises:
        StorageError: the file cannot be written; an older one is untouched.
    """
    certificate = {
        "config": config.name,
        "config_sha256": config_hash(config),
        "compared_as": result.config.model_dump(mode="json"),
        "code": versions(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
        **as_dict(result),
    }
    write_json(path, certificate)


def _outcome(outcome: Outcome, tolerance: float) -> dict[str, Any]:
    answer: dict[str, Any] = {"layout": outcome.layout.name, "ok": outcome.holds(tolerance)}
    d = outcome.difference
    if d is None:
        return {**answer, "max_rel_err": None, "worst": None, "error": outcome.error}
    worst = d.gradient_of if d.gradient >= d.weight else d.weight_of
    return {
        **answer,
        "max_rel_err": _finite(d.largest),
        "worst": worst,
        "differs_first": d.first,
        "loss": _finite(d.loss),
        "grad_norm": _finite(d.grad_norm),
        "gradient": _finite(d.gradient),
        "gradient_of": d.gradient_of,
        "weight": _finite(d.weight),
        "weight_of": d.weight_of,
    }


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None  # JSON has no NaN
