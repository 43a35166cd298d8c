"""The TensorBoard mirror, written with tensorboard's own event writer (the one in torch would bring torch along)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dist_llm.report.names import mirror_values

__all__ = ["TensorBoardMirror"]


class TensorBoardMirror:
    """Scalars in an event file; each process of a run adds a file to the same folder.

    Args:
        path: folder of the event files, ``tb/`` in the run directory.

    Raises:
        OSError: the folder cannot be written.
    """

    # ImportError: no tensorboard; OSError: the disk. The writer's thread hands its own errors over as they are.
    failures: tuple[type[Exception], ...] = (ImportError, OSError)

    def __init__(self, path: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(path))

    def log(self, record: dict[str, Any]) -> None:
        """Write the numbers of one record at its step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in mirror_values(record).items()]
        self._writer.add_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))
        self._writer.flush()  # else a killed run loses the two minutes before its last checkpoint, which are not written again

    def resumed(self, step: int) -> None:
        """Tell readers to forget what earlier files say about steps after ``step``: they are written again."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # A session start hides every earlier event whose step is not below its own.
        start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
        self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered and close the event file."""
        self._writer.close()
