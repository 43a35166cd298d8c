"""The Weights & Biases mirror, through wandb's own client, offline or online.

A run keeps one wandb id over all its attempts: it is made once and kept in ``wandb/run-id`` of the run directory.
wandb's history can only grow, so the steps that a resumed run repeats stand in it twice. Each row therefore carries
``run/attempt``, and the first row of a resumed attempt ``run/resumed_at``: of two rows with one ``train/step`` the one
of the later attempt counts, as in ``metrics.jsonl``.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any, Literal

from dist_llm.report.names import STEP_NAME, mirror_values
from dist_llm.utils.errors import StorageError
from dist_llm.utils.files import write_atomic

__all__ = ["WandbMirror"]

_LOGIN_TIMEOUT_S = 60.0  # an unanswered question for the key must not hold a run
_FINISH_TIMEOUT_S = 60.0  # nor a slow server its requeue; what is not sent stays on disk for `wandb sync`


def _wait_for_free_folder(run_dir: Path, run_id: str) -> None:
    # wandb names an attempt's folder by second and id, and would write over a predecessor of the same second.
    while list((run_dir / "wandb").glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}")):
        time.sleep(0.05)


class WandbMirror:
    """Rows in a wandb run, with ``train/step`` as the x axis of every chart.

    Args:
        run_dir: the run directory; wandb writes to ``wandb/`` in it.
        project: wandb project.
        mode: "offline" (nothing leaves the machine; ``wandb sync`` sends it later) or "online".
        config: the resolved config.
        name: name of the run.

    Raises:
        one of open_failures(): wandb cannot start, has no key, or does not reach its server.
    """

    def __init__(self, run_dir: Path, project: str, mode: Literal["offline", "online"], config: dict[str, Any], name: str) -> None:
        import wandb

        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self.run_id = self._kept(folder / "run-id", secrets.token_hex(4))
        self.attempt = int(self._kept(folder / "attempt", "0")) + 1
        write_atomic(folder / "attempt", f"{self.attempt}\n")
        # The mode is given to the process first: left at its default there, the client looks up its server's name
        # even for an offline run.
        wandb.setup(wandb.Settings(mode=mode, silent=True))
        bounded: dict[str, Any] = (
            {"finish_timeout": _FINISH_TIMEOUT_S} if "finish_timeout" in wandb.Settings.model_fields else {}
        )  # newer clients
        settings = wandb.Settings(
            **bounded,
            silent=True,  # the console belongs to the run
            console="off",  # and is not copied
            disable_code=True,
            disable_git=True,
            save_code=False,
            login_timeout=_LOGIN_TIMEOUT_S,
        )
        _wait_for_free_folder(run_dir, self.run_id)
        self._run = wandb.init(
            project=project,
            id=self.run_id,
            name=name,
            mode=mode,
            dir=str(run_dir),
            config=config,
            resume="allow",
            allow_val_change=True,  # a resumed run may be given more steps
            settings=settings,
        )
        self._run.define_metric(STEP_NAME, hidden=True)
        for group in ("train", "perf", "eval", "run"):
            self._run.define_metric(f"{group}/*", step_metric=STEP_NAME)

    @staticmethod
    def _kept(path: Path, new: str) -> str:
        # What the file says; it is made with the new value if it is not there.
        if not path.exists():
            write_atomic(path, new + "\n")
        return path.read_text(encoding="utf-8").strip()

    @staticmethod
    def open_failures() -> tuple[type[Exception], ...]:
        """What opening and using the client may raise that is not our fault."""
        # ConnectionError and TimeoutError, of a service that died or a server that is silent, are OSErrors.
        try:
            import wandb
        except ImportError:
            return (ImportError,)
        try:
            from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
        except ImportError:  # older clients raise their own wandb.Error or an OSError instead
            return (wandb.Error, OSError, StorageError)
        return (wandb.Error, OSError, StorageError, HandleAbandonedError, MailboxClosedError)

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What the client raises when it, its service or its server is at fault."""
        return self.open_failures()

    def log(self, record: dict[str, Any]) -> None:
        """Add one row: the record's numbers, its step and this attempt."""
        # wandb's own step is left alone: it only grows, and refuses the steps that a resumed run repeats.
        self._run.log({STEP_NAME: record["step"], "run/attempt": self.attempt, **mirror_values(record)})

    def resumed(self, step: int) -> None:
        """Add a row that says from which step this attempt went on."""
        self._run.log({STEP_NAME: step, "run/attempt": self.attempt, "run/resumed_at": step})

    def close(self) -> None:
        """Hand over what is buffered and end the wandb run; a later attempt goes on with it."""
        self._run.finish()
