"""``metrics.jsonl``, the truth about a run, and ``events.jsonl``, its biography.

A metrics record is flat: ``kind`` ("train" or "eval"), ``step``, and numbers. Everything else that shows a run
(console, TensorBoard, wandb, the report) is a mirror of this file. Each step stands in it once: a run that resumes
from the checkpoint of step k first removes what was written after k, with :func:`cut_after`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from dist_llm.report.jsonl import append_line, decode, open_lines, read_lines, whole_lines
from dist_llm.utils.errors import DataError
from dist_llm.utils.files import write_atomic

__all__ = ["EVAL_FIELDS", "KINDS", "TRAIN_FIELDS", "EventLog", "MetricsWriter", "cut_after", "read_events", "read_metrics"]

KINDS = ("train", "eval")

# field: what it is, in which unit. docs/watching.md shows this table.
TRAIN_FIELDS = {
    "loss": "mean over the global batch's valid target tokens, in nats per token",
    "bits_per_byte": "the same loss in bits per byte of original text",
    "lr": "learning rate of this step",
    "grad_norm": "global gradient norm before clipping",
    "tokens": "target tokens seen since the run began",
    "tokens_per_s": "tokens of this step per second, over all ranks",
    "mfu": "model FLOPs per second over the hardware's peak, 0 to 1",
    "step_s": "seconds of the step, data and communication included",
    "data_s": "seconds of it spent waiting for data",
    "comm_s": "seconds of it spent in communication that compute did not hide",
    "comm_bytes": "bytes the main rank sent, by the ring figure; absent on one rank",
    "comm_bytes_GROUP": "the same by group: world, zero, tp, cp, pp, ...; see docs/communication.md",
    "memory_bytes": "peak memory of the fullest rank",
}
EVAL_FIELDS = {
    "loss": "mean over the held-out tokens, in nats per token",
    "bits_per_byte": "the same loss in bits per byte of original text",
    "tokens": "held-out tokens read",
    "bytes": "bytes of original text they stand for",
    "eval_s": "seconds of the evaluation",
}


class MetricsWriter:
    """Appends records to ``metrics.jsonl``; a SIGKILL loses at most the line being written.

    One process writes a file: the rank that owns the numbers. Opening removes the torn line of a killed predecessor.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_lines(path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record.

        Args:
            record: flat; ``kind`` is one of KINDS and ``step`` an integer. NaN and infinities are kept, as strings.

        Raises:
            StorageError: the disk is full or refuses.
        """
        assert record.get("kind") in KINDS, f"kind must be one of {KINDS}, not {record.get('kind')!r}"
        assert isinstance(record.get("step"), int), f"step must be an integer, not {record.get('step')!r}"
        append_line(self._file, record)

    def close(self) -> None:
        """Close the file; the writer is of no use afterwards."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every record in order; a torn last line is skipped, and a file that is not there yet has none.

    Raises:
        DataError: a whole line is no metrics record.
    """
    records = read_lines(path)
    for number, record in enumerate(records, start=1):
        _step_of(record, path, number)
    return records


def _step_of(record: dict[str, Any], path: Path, number: int) -> int:
    step = record.get("step")
    if record.get("kind") not in KINDS or not isinstance(step, int):
        raise DataError(
            f"{path}, record {number}: a metrics record has kind {' or '.join(KINDS)} and an integer step, "
            f"this one has kind {record.get('kind')!r} and step {step!r}; remove the line, or restore the file"
        )
    return step


def cut_after(path: Path, step: int) -> int:
    """Remove every record later than ``step``, and a torn last line, so that a resumed run writes each step once.

    The file is replaced as a whole: whoever reads meanwhile, or loses power, sees the old one or the new one.

    Returns:
        how many records were removed (a torn line is none).
    """
    kept: list[bytes] = []
    removed = 0
    for number, line in enumerate(whole_lines(path), start=1):
        if _step_of(decode(line, path, number), path, number) <= step:
            kept.append(line)
        else:
            removed += 1
    if path.exists() and path.stat().st_size != sum(map(len, kept)):
        write_atomic(path, b"".join(kept))
    return removed


class EventLog:
    """Appends what happened to a run: start, resume, checkpoint, stop, finish. Kept over resumes, never cut."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the time (UTC, ISO 8601) and wait until the disk has it.

        Raises:
            StorageError: the disk is full or refuses.
        """
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
        with open_lines(self._path) as f:
            append_line(f, record, durable=True)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every event in order; a torn last line is skipped, and a file that is not there yet has none."""
    return read_lines(path)
