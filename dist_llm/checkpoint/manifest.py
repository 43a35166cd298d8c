"""What a checkpoint directory holds, and the proof that it holds it.

``manifest.json`` is written last and lists every file with size and SHA-256: a directory without a manifest, or with a file
that does not match it, is not a checkpoint. The manifest carries a hash of itself: a flipped digit in ``next_sample`` would
otherwise be read as another position in the data. Tensors are stored whole, under logical names, in safetensors files of bounded
size: ``weights`` are the fp32 masters, ``exp_avg`` and ``exp_avg_sq`` AdamW's moments.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_llm.utils.errors import NoCheckpointError
from dist_llm.utils.files import sha256_bytes, sha256_file

__all__ = ["FORMAT", "SECTIONS", "Manifest", "damage", "read_manifest"]

FORMAT = 1
SECTIONS = ("weights", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``."""

    step: int  # optimiser steps taken
    next_sample: int  # global sample number the next step begins with
    tokens: int  # valid target tokens seen
    config: dict[str, Any]  # the resolved config
    corpus: str  # hash of the corpus index: another corpus is another run
    files: dict[str, dict[str, Any]]  # name -> {"size", "sha256"}
    tensors: dict[str, dict[str, str]]  # section -> logical name -> file
    versions: dict[str, str]
    format: int = FORMAT

    def to_json(self) -> str:
        """Indented JSON, with the SHA-256 of the rest under ``sha256``."""
        value = asdict(self)
        return _dump({**value, "sha256": _hash(value)})


def read_manifest(directory: Path) -> Manifest:
    """The manifest of ``directory``.

    Raises:
        NoCheckpointError: there is none, or it cannot be read.
    """
    path = directory / "manifest.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("format") != FORMAT:
            raise NoCheckpointError(f"{path}: format {value.get('format')!r}, this version reads {FORMAT}; use the dist-llm that wrote it")
        if value.pop("sha256", None) != _hash(value):
            raise NoCheckpointError(f"{path} is damaged: its SHA-256 is not the one it carries")
        return Manifest(**value)
    except FileNotFoundError:
        raise NoCheckpointError(f"{directory}: no manifest.json, so this checkpoint was never finished") from None
    except OSError as error:
        raise NoCheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise NoCheckpointError(f"{path} is damaged ({error})") from error


def damage(directory: Path, manifest: Manifest) -> str | None:
    """The first difference between the files of ``directory`` and its manifest as a sentence, or None when there is none.

    Reads every byte: only a hash finds a flipped bit.
    """
    for name, expected in sorted(manifest.files.items()):
        path = directory / name
        try:
            if not path.is_file():
                return f"{path} is missing"
            size = path.stat().st_size
            if size != expected["size"]:
                return f"{path} has {size} bytes, the manifest says {expected['size']}"
            if sha256_file(path) != expected["sha256"]:
                return f"{path} is damaged: its SHA-256 is not the manifest's"
        except OSError as error:  # a bad sector, or permissions lost in a copy
            return f"{path} cannot be read: {error.strerror}"
    return None


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _hash(value: dict[str, Any]) -> str:
    return sha256_bytes(_dump(value).encode())
