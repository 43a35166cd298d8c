"""metrics.jsonl and events.jsonl: nothing lost but the line being written, and each step once."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_llm.report.metrics import EVAL_FIELDS, TRAIN_FIELDS, EventLog, MetricsWriter, cut_after, read_events, read_metrics
from dist_llm.utils.errors import DataError, StorageError


def _write(path: Path, steps: range) -> None:
    with MetricsWriter(path) as writer:
        for step in steps:
            writer.write({"kind": "train", "step": step, "loss": 1 / step})


def test_records_come_back_in_order_and_unchanged(tmp_path: Path) -> None:
    records = [{"kind": "train", "step": 1, "loss": 0.1 + 0.2, "tokens": 512}, {"kind": "eval", "step": 1, "loss": 1e-300, "bytes": 7}]
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        for record in records:
            writer.write(record)
    assert read_metrics(tmp_path / "m.jsonl") == records


def test_a_record_is_in_the_file_before_the_writer_is_closed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl")
    writer.write({"kind": "train", "step": 1, "loss": 2.0})
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1
    writer.close()


def test_non_finite_numbers_are_strings_in_valid_json_and_floats_when_read(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"kind": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert (line["loss"], line["grad_norm"], line["lr"]) == ("nan", "inf", "-inf")
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf and record["lr"] == -math.inf


def test_a_sigkill_loses_at_most_the_line_being_written(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    program = (
        "import sys; from pathlib import Path; from dist_llm.report.metrics import MetricsWriter\n"
        "w = MetricsWriter(Path(sys.argv[1]))\n"
        "for step in range(1, 10**9):\n"
        "    w.write({'kind': 'train', 'step': step, 'loss': 1.0 / step})\n"
        "    print(step, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 300:
                process.send_signal(signal.SIGKILL)
                break
        said = int((process.stdout.read().split() or [line])[-1])
    steps = [record["step"] for record in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= said >= 300


def test_a_torn_last_line_is_skipped_and_removed_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, range(1, 4))
    with path.open("ab") as f:
        f.write(b'{"kind": "train", "step": 4, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    _write(path, range(4, 5))
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]


def test_a_torn_line_longer_than_a_read_is_removed_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, range(1, 3))
    before = path.read_bytes()
    path.write_bytes(before + b"x" * 200_000)
    MetricsWriter(path).close()
    assert path.read_bytes() == before


def test_cut_after_removes_later_steps_and_the_torn_line_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, range(1, 6))
    with MetricsWriter(path) as writer:
        writer.write({"kind": "eval", "step": 5, "loss": 1.0})
        writer.write({"kind": "train", "step": 6, "loss": 1.0})
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:3])
    with path.open("ab") as f:
        f.write(b'{"kind"')
    assert cut_after(path, 3) == 4
    assert path.read_bytes() == kept
    assert cut_after(path, 3) == 0
    assert list(tmp_path.iterdir()) == [path]


def test_cut_after_keeps_the_evaluation_of_the_step_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"kind": "train", "step": 3, "loss": 1.0})
        writer.write({"kind": "eval", "step": 3, "loss": 1.5})
    assert cut_after(path, 3) == 0
    assert [r["kind"] for r in read_metrics(path)] == ["train", "eval"]


def test_cut_after_of_a_file_that_is_not_there_removes_nothing_and_makes_none(tmp_path: Path) -> None:
    assert cut_after(tmp_path / "m.jsonl", 0) == 0
    assert not (tmp_path / "m.jsonl").exists()


@pytest.mark.parametrize("line", [b"not json\n", b'{"kind": "train"}\n', b'{"step": 1}\n', b"[1]\n", b"\xff\n"])
def test_a_damaged_line_is_named_with_file_and_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, range(1, 2))
    with path.open("ab") as f:
        f.write(line)
    _write(path, range(2, 3))
    with pytest.raises(DataError, match=r"m\.jsonl, (line|record) 2"):
        read_metrics(path)
    with pytest.raises(DataError, match="2"):
        cut_after(path, 0)


def test_a_full_disk_is_a_storage_error_that_names_the_file() -> None:
    with pytest.raises(StorageError, match="/dev/full"):
        MetricsWriter(Path("/dev/full")).write({"kind": "train", "step": 1})


def test_events_carry_their_time_and_survive_a_torn_line(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("start", ranks=2)
    with (tmp_path / "events.jsonl").open("ab") as f:
        f.write(b'{"time')
    log.write("resume", step=10)
    events = read_events(tmp_path / "events.jsonl")
    assert [(e["event"], e.get("ranks"), e.get("step")) for e in events] == [("start", 2, None), ("resume", None, 10)]
    assert all(e["time"].endswith("+00:00") for e in events)
    assert events[0]["time"] <= events[1]["time"]


def test_the_documentation_tells_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "watching.md").read_text(encoding="utf-8")
    for fields, until in ((TRAIN_FIELDS, "| eval | meaning |"), (EVAL_FIELDS, "A record is handed")):
        table, text = text.split(until)
        rows = [line for line in table.splitlines() if line.startswith("| `")]
        assert rows[-len(fields) :] == [f"| `{name}` | {meaning} |" for name, meaning in fields.items()]
