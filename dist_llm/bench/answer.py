"""Answers of races as one JSON object.

JSON has no infinity: an error that is not finite is written as the string "inf", as in ``report.jsonl``, and read as a float again.
"""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["decode", "encode"]


def encode(answer: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(_safe(answer), allow_nan=False)


def decode(text: str) -> dict[str, Any]:
    """The answer that ``encode`` wrote.

    Raises:
        ValueError: the text is no JSON object.
    """
    answer = json.loads(text, object_hook=lambda read: {k: math.inf if v == "inf" else v for k, v in read.items()})
    if not isinstance(answer, dict):
        raise ValueError(f"a JSON object is needed, this is {type(answer).__name__}")
    return answer


def _safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_safe(v) for v in value]
    return "inf" if isinstance(value, float) and not math.isfinite(value) else value
