"""Predicted beside measured: what plan.json said before the run's newest attempt, and what its steps then were.

Measured time is the median of the attempt's steps beyond its first three, which pay for first use; measured memory is the peak of the
fullest rank. A ratio is measured over predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from dist_llm.report.run import RunData, numbers
from dist_llm.utils.format import byte_size

__all__ = ["ForecastRow", "forecast_notes", "forecast_rows"]

_WARM_UP = 3  # steps


@dataclass(frozen=True)
class ForecastRow:
    """One line of the table, as text; ``measured_value / predicted_value`` is the ratio where both are known."""

    label: str
    predicted: str
    measured: str
    note: str
    predicted_value: float | None = None
    measured_value: float | None = None

    @property
    def ratio(self) -> str:
        """Measured over predicted, or a dash."""
        if self.predicted_value is None or self.measured_value is None or self.predicted_value <= 0:
            return "-"
        return f"{self.measured_value / self.predicted_value:.2f}"


def forecast_rows(run: RunData) -> list[ForecastRow]:
    """Step time, MFU, memory and traffic, predicted and measured; nothing for a run without plan.json."""
    if not run.plan:
        return []
    first = _start(run.plan) + 1
    steps = [r for r in run.train if r["step"] >= first]
    warm = [r for r in steps if r["step"] >= first + _WARM_UP]
    rows = [
        _timed("step time", _part(run.plan, "time"), ("step_s", "low_s", "high_s"), _middle(warm, "step_s"), _seconds),
        _timed("model FLOPs utilisation", _part(run.plan, "time"), ("mfu", "mfu_low", "mfu_high"), _middle(warm, "mfu"), "{:.1%}".format),
        _memory(_part(run.plan, "memory"), steps),
    ]
    if "traffic" in run.plan:
        rows.append(_traffic(_part(run.plan, "traffic"), _middle(warm, "comm_bytes")))
    return rows


def forecast_notes(run: RunData) -> list[str]:
    """Sentences below the table: where the rates come from, what memory is made of, what to know about the figures."""
    if not run.plan:
        return []
    time, memory = _part(run.plan, "time"), _part(run.plan, "memory")
    notes = []
    if isinstance(time.get("rates"), str):
        notes.append(f"Rates of the machine: {time['rates']}.")
    notes += [f"{note[:1].upper()}{note[1:]}." for note in _texts(time.get("notes"))]
    parts, left_out = _mapping(memory.get("parts")), _mapping(memory.get("left_out"))
    counted = [f"{name} {byte_size(size)}" for name, size in parts.items() if name not in left_out and _number(size)]
    if counted:
        notes.append(f"Predicted memory of the fullest rank: {', '.join(counted)}.")
    notes += [f"Not in it: {name}, {byte_size(parts.get(name) or 0)} ({why})." for name, why in left_out.items()]
    return notes


def _timed(
    label: str, plan: dict[str, Any], names: tuple[str, str, str], measured: float | None, form: Callable[[float], str]
) -> ForecastRow:
    value, low, high = (_number(plan.get(name)) for name in names)
    shown = form(measured) if measured is not None else "not yet"
    if value is None:
        return ForecastRow(label, "not predicted", shown, str(plan.get("reason", "the peak of the device is not known")))
    if low is None or high is None:
        return ForecastRow(label, form(value), shown, "", value, measured)
    note = ""
    if measured is not None:
        note = "below the interval" if measured < low else "above the interval" if measured > high else "inside the interval"
    return ForecastRow(label, f"{form(value)} ({form(low)} to {form(high)})", shown, note, value, measured)


def _memory(plan: dict[str, Any], steps: list[dict[str, Any]]) -> ForecastRow:
    peaks = numbers(steps, "memory_bytes")[1]
    peak = max(peaks) if peaks else None
    value = _number(plan.get("bytes"))
    note, measured = "peak of the tensors on the fullest rank's device", peak
    if plan.get("measured_as") == "resident" and peak is not None:
        before, highest = _number(plan.get("baseline_bytes")), _number(plan.get("baseline_peak_bytes"))
        if before is None:
            note, measured = "the whole process; what it held before the engine was built is not known", None
        elif highest is not None and peak <= highest:
            note, measured = f"the process held {byte_size(highest)} before the engine was built, and never more after", None
        else:
            measured = peak - before
            note = f"peak of the process, {byte_size(peak)}, without the {byte_size(before)} it held before the engine was built; libraries that load later count"
    shown = byte_size(measured) if measured is not None else "not known" if peak is not None else "not yet"
    if value is None:
        return ForecastRow("memory, fullest rank", "not predicted", shown, str(plan.get("reason", "")))
    return ForecastRow("memory, fullest rank", byte_size(value), shown, note if peak is not None else "", value, measured)


def _traffic(plan: dict[str, Any], measured: float | None) -> ForecastRow:
    value = _number(plan.get("bytes"))
    label, shown = "bytes sent in a step, main rank", byte_size(measured) if measured is not None else "not yet"
    if value is None:
        return ForecastRow(label, "not predicted", shown, str(plan.get("reason", "")))
    return ForecastRow(label, byte_size(value), shown, "by the ring figure", value, measured)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s" if value < 100 else f"{value:,.0f} s"


def _middle(records: list[dict[str, Any]], name: str) -> float | None:
    values = numbers(records, name)[1]
    return median(values) if values else None


def _start(plan: dict[str, Any]) -> int:
    step = plan.get("start_step")
    return step if isinstance(step, int) else 0


def _part(plan: dict[str, Any], name: str) -> dict[str, Any]:
    return _mapping(plan.get(name))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
