"""Find the newest valid checkpoint and read its tensors by logical name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dist_llm.checkpoint.manifest import Manifest, damage, read_manifest
from dist_llm.checkpoint.names import list_recoverable
from dist_llm.utils.errors import NoCheckpointError

__all__ = ["Checkpoint", "find_checkpoint", "open_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose every byte matched its manifest when it was opened."""

    directory: Path
    manifest: Manifest

    def tensors(self, section: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(logical name, tensor) of one section, file by file.

        Raises:
            NoCheckpointError: the checkpoint has no such section, or a file of it went bad or away since it was opened.
        """
        if section not in self.manifest.tensors:
            raise NoCheckpointError(f"{self.directory} holds no {section}, only {', '.join(sorted(self.manifest.tensors))}")
        by_file: dict[str, list[str]] = {}
        for name, file in self.manifest.tensors[section].items():
            by_file.setdefault(file, []).append(name)
        for file, names in by_file.items():
            try:
                with safe_open(self.directory / file, framework="pt") as f:
                    for name in names:
                        yield name, f.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise NoCheckpointError(f"{self.directory / file} cannot be read: {error}") from error


def open_checkpoint(directory: Path, *, verify: bool = True) -> Checkpoint:
    """The checkpoint in ``directory``.

    Args:
        directory: of one checkpoint.
        verify: read every byte and compare hashes.

    Raises:
        NoCheckpointError: unfinished or damaged, with the file that is.
    """
    if not directory.is_dir():
        raise NoCheckpointError(f"{directory}: no such checkpoint")
    manifest = read_manifest(directory)
    problem = damage(directory, manifest) if verify else None
    if problem is not None:
        raise NoCheckpointError(problem)
    return Checkpoint(directory, manifest)


def find_checkpoint(root: Path, *, verify: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint under ``root`` and a sentence on each newer one that is not.

    ``latest`` is not read: it is a hint for people, and a directory listing is the truth. A checkpoint that a killed save had
    moved aside, with nothing in its place yet, is found where it lies.
    """
    problems: list[str] = []
    for directory in reversed(list_recoverable(root)):
        try:
            return open_checkpoint(directory, verify=verify), problems
        except NoCheckpointError as error:
            problems.append(str(error))
    return None, problems
