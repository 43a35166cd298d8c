"""Predicted beside measured: the rows of the table, from plan.json and metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_llm.report.forecast import ForecastRow, forecast_notes, forecast_rows
from dist_llm.report.html import write_report
from dist_llm.report.metrics import MetricsWriter
from dist_llm.report.run import load_run
from dist_llm.utils.errors import DataError

MB = 2**20
PLAN: dict[str, Any] = {
    "start_step": 0,
    "time": {
        "step_s": 0.5, "low_s": 0.4, "high_s": 0.6, "mfu": 0.4, "mfu_low": 0.3, "mfu_high": 0.5,
        "notes": ["the interval is a guess"], "rates": "a <file>",
    },
    "memory": {
        "bytes": 100 * MB, "measured_as": "resident", "baseline_bytes": 200 * MB, "baseline_peak_bytes": 210 * MB,
        "parts": {"parameters": 60 * MB, "activations": 40 * MB, "slack": 7 * MB}, "left_out": {"slack": "not touched"},
    },
    "traffic": {"bytes": 4096.0},
}  # fmt: skip


def _run(path: Path, plan: object, step_s: list[float], memory: int = 320 * MB) -> Path:
    path.mkdir()
    with MetricsWriter(path / "metrics.jsonl") as writer:
        for step, seconds in enumerate(step_s, 1):
            writer.write({
                "kind": "train", "step": step, "loss": 2.0, "step_s": seconds, "mfu": 0.2 / seconds, "memory_bytes": memory, "comm_bytes": 4096,
            })  # fmt: skip
    if plan is not None:
        (path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return path


def _rows(path: Path, plan: object, step_s: list[float], memory: int = 320 * MB) -> dict[str, ForecastRow]:
    return {row.label: row for row in forecast_rows(load_run(_run(path, plan, step_s, memory)))}


def test_measured_time_is_the_median_beyond_the_first_three_steps(tmp_path: Path) -> None:
    row = _rows(tmp_path / "run", PLAN, [9.0, 9.0, 9.0, 0.55, 0.5, 0.6])["step time"]
    assert (row.predicted, row.measured, row.ratio, row.note) == ("500 ms (400 ms to 600 ms)", "550 ms", "1.10", "inside the interval")


def test_only_steps_of_the_attempt_that_was_planned_are_measured(tmp_path: Path) -> None:
    row = _rows(tmp_path / "run", {**PLAN, "start_step": 4}, [0.1] * 4 + [9.0] * 3 + [0.7, 0.7])["step time"]
    assert (row.measured, row.ratio, row.note) == ("700 ms", "1.40", "above the interval")


def test_on_a_cpu_what_the_process_held_before_is_not_counted(tmp_path: Path) -> None:
    row = _rows(tmp_path / "run", PLAN, [0.5] * 5)["memory, fullest rank"]
    assert (row.predicted, row.measured, row.ratio) == ("100.0 MiB", "120.0 MiB", "1.20") and "without the 200.0 MiB" in row.note


def test_a_peak_from_before_the_engine_is_no_measurement(tmp_path: Path) -> None:
    row = _rows(tmp_path / "run", PLAN, [0.5] * 5, memory=210 * MB)["memory, fullest rank"]
    assert (row.measured, row.ratio) == ("not known", "-") and "never more after" in row.note


def test_on_a_gpu_the_peak_of_tensors_counts_whole(tmp_path: Path) -> None:
    memory = {"bytes": 100 * MB, "measured_as": "allocated"}
    row = _rows(tmp_path / "run", {**PLAN, "memory": memory}, [0.5] * 5, memory=95 * MB)["memory, fullest rank"]
    assert (row.measured, row.ratio) == ("95.0 MiB", "0.95")


def test_what_was_not_predicted_says_why(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "run", {**PLAN, "time": {"reason": "the run offloads"}}, [0.5] * 5)
    assert (rows["step time"].predicted, rows["step time"].note, rows["step time"].ratio) == ("not predicted", "the run offloads", "-")
    assert rows["step time"].measured == "500 ms"


def test_mfu_and_traffic_have_rows_of_their_own(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "run", PLAN, [0.5] * 5)
    assert (rows["model FLOPs utilisation"].predicted, rows["model FLOPs utilisation"].measured) == ("40.0% (30.0% to 50.0%)", "40.0%")
    assert rows["bytes sent in a step, main rank"].ratio == "1.00"


@pytest.mark.parametrize("steps", [0, 3])
def test_a_run_without_enough_steps_has_a_forecast_and_no_measurement(tmp_path: Path, steps: int) -> None:
    row = _rows(tmp_path / "run", PLAN, [0.5] * steps)["step time"]
    assert (row.measured, row.ratio) == ("not yet", "-")


def test_notes_name_the_rates_the_parts_and_what_is_left_out(tmp_path: Path) -> None:
    notes = forecast_notes(load_run(_run(tmp_path / "run", PLAN, [])))
    assert notes == [
        "Rates of the machine: a <file>.",
        "The interval is a guess.",
        "Predicted memory of the fullest rank: parameters 60.0 MiB, activations 40.0 MiB.",
        "Not in it: slack, 7.0 MiB (not touched).",
    ]


def test_the_page_has_the_table_and_escapes_what_it_shows(tmp_path: Path) -> None:
    page = write_report(_run(tmp_path / "run", PLAN, [0.5] * 5)).read_text(encoding="utf-8")
    assert "Predicted and measured" in page and "inside the interval" in page and "a &lt;file&gt;" in page


def test_a_run_without_a_plan_has_a_page_without_the_table(tmp_path: Path) -> None:
    page = write_report(_run(tmp_path / "run", None, [0.5] * 5)).read_text(encoding="utf-8")
    assert "Predicted and measured" not in page and "Curves" in page


def test_a_damaged_plan_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"plan\.json .*remove it"):
        load_run(_run(tmp_path / "run", [1], []))
