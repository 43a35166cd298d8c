"""The names that mirrors show: ``train/`` what the run learns, ``perf/`` what it costs, ``eval/`` held-out numbers."""

from __future__ import annotations

from typing import Any

__all__ = ["STEP_NAME", "mirror_values"]

STEP_NAME = "train/step"  # the x axis of every chart

_LEARNING = frozenset({"loss", "bits_per_byte", "lr", "grad_norm", "tokens"})


def mirror_values(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a metrics record under their grouped names; the step and what is no number are left out."""
    values: dict[str, float] = {}
    for field, value in record.items():
        if field == "step" or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        group = "eval" if record["kind"] == "eval" else "train" if field in _LEARNING else "perf"
        values[f"{group}/{field}"] = value
    return values
