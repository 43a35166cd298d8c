"""Mirrors: other places that show what ``metrics.jsonl`` says, and whose failure never touches the run.

A mirror gets the same records as the file. It is a convenience: the first time its client fails, that is noted, the
mirror is dropped and training goes on; the file stays complete.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from dist_llm.report.tensorboard_mirror import TensorBoardMirror
from dist_llm.report.wandb_mirror import WandbMirror

__all__ = ["Mirror", "Mirrors", "TensorBoardMirror", "WandbMirror", "open_mirrors"]


class Mirror(Protocol):
    """A place that metrics records are copied to."""

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What its client raises when it, not our code, is at fault."""

    def log(self, record: dict[str, Any]) -> None:
        """Copy one metrics record."""

    def resumed(self, step: int) -> None:
        """Mark that the run went on from the checkpoint of ``step``: records after it are about to come again."""

    def close(self) -> None:
        """Hand over what is still buffered."""


class Mirrors:
    """Several mirrors as one; each is dropped, with one note, at the first failure of its client.

    Args:
        mirrors: name of each, and the mirror.
        note: told the sentence about a failure, such as ``Console.note``.
    """

    failures: tuple[type[Exception], ...] = ()

    def __init__(self, mirrors: dict[str, Mirror], note: Callable[[str], None]) -> None:
        self._mirrors = dict(mirrors)
        self._note = note

    @property
    def names(self) -> tuple[str, ...]:
        """The mirrors that still work."""
        return tuple(self._mirrors)

    def log(self, record: dict[str, Any]) -> None:
        """Copy one metrics record to each mirror."""
        self._each(lambda mirror: mirror.log(record))

    def resumed(self, step: int) -> None:
        """Mark in each mirror that the run went on from ``step``."""
        self._each(lambda mirror: mirror.resumed(step))

    def close(self) -> None:
        """Close each mirror."""
        self._each(lambda mirror: mirror.close())

    def _each(self, action: Callable[[Mirror], None]) -> None:
        for name, mirror in list(self._mirrors.items()):
            try:
                action(mirror)
            except mirror.failures as error:
                del self._mirrors[name]
                self._note(_lost(name, error))


def _lost(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{name} mirror is off from here on ({type(error).__name__}: {reason}); training goes on and metrics.jsonl stays complete"


def open_mirrors(
    run_dir: Path,
    *,
    tensorboard: bool,
    wandb: Literal["off", "offline", "online"],
    project: str,
    name: str,
    config: dict[str, Any],
    note: Callable[[str], None],
) -> Mirrors:
    """Open the mirrors that the config's ``log`` section asks for; one that cannot be opened is noted and left out.

    Args:
        run_dir: mirrors write to ``tb/`` and ``wandb/`` in it.
        tensorboard: whether to mirror to TensorBoard.
        wandb: "off", "offline" or "online".
        project: wandb project.
        name: name of the run.
        config: the resolved config, shown by wandb.
        note: told the sentence about a failure.
    """
    mirrors: dict[str, Mirror] = {}
    if tensorboard:
        try:
            mirrors["tensorboard"] = TensorBoardMirror(run_dir / "tb")
        except TensorBoardMirror.failures as error:
            note(_lost("tensorboard", error))
    if wandb != "off":
        try:
            mirrors["wandb"] = WandbMirror(run_dir, project=project, mode=wandb, config=config, name=name)
        except WandbMirror.open_failures() as error:
            note(_lost("wandb", error))
    return Mirrors(mirrors, note)
