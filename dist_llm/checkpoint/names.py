"""Names of checkpoint directories, and which of them are there.

Only ``step-`` and digits is a checkpoint: a copy somebody made beside it (``step-00000100.bak``) is not, and neither are the hidden
directories a save works in.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["checkpoint_name", "final_of", "list_checkpoints", "list_recoverable", "name_aside", "name_temporary"]

_FINAL = re.compile(r"step-(\d{8,})")
_ASIDE = re.compile(r"\.step-(\d{8,})\.\d+\.old")


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def name_temporary(name: str, pid: int) -> str:
    """Where process ``pid`` writes checkpoint ``name`` until it is whole."""
    return f".{name}.{pid}.tmp"


def name_aside(name: str, pid: int) -> str:
    """Where process ``pid`` moves an older checkpoint ``name`` for the moment in which a new one takes its place."""
    return f".{name}.{pid}.old"


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoint directories under ``root``, whole or not, fewest steps first."""
    return _sorted(_numbered(root, _FINAL))


def list_recoverable(root: Path) -> list[Path]:
    """``list_checkpoints``, and those that a killed save had moved aside without putting a new one in their place."""
    return _sorted(_numbered(root, _FINAL) | {p: n for p, n in _numbered(root, _ASIDE).items() if not final_of(p).exists()})


def final_of(aside: Path) -> Path:
    """Where the checkpoint that was moved to ``aside`` belongs."""
    return aside.with_name(aside.name.split(".")[1])


def _numbered(root: Path, pattern: re.Pattern[str]) -> dict[Path, int]:
    return {path: int(match[1]) for path in root.glob("*") if (match := pattern.fullmatch(path.name)) and path.is_dir()}


def _sorted(numbers: dict[Path, int]) -> list[Path]:
    return sorted(numbers, key=lambda path: (numbers[path], path.name))
