"""Write a checkpoint so that a kill at any moment leaves the old ones whole and the new one whole or absent.

Temporary directory, files with fsync, manifest with hashes, rename, fsync of the parent, then the hint ``latest``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dist_llm.checkpoint.manifest import Manifest
from dist_llm.utils.errors import StorageError
from dist_llm.utils.files import fsync_dir, sha256_file, write_atomic

__all__ = ["checkpoint_name", "prune", "save_checkpoint"]

MAX_FILE_BYTES = 4 << 30


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def save_checkpoint(
    root: Path,
    tensors: Iterable[tuple[str, str, torch.Tensor]],
    *,
    step: int,
    next_sample: int,
    tokens: int,
    config: dict[str, Any],
    corpus: str,
    versions: dict[str, str],
    writes: bool,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Save one checkpoint under ``root``; every rank calls this, the one with ``writes`` touches the disk.

    Args:
        root: the run's ``checkpoints`` directory.
        tensors: (section, logical name, whole fp32 tensor). Iterating may communicate, so all ranks do it to the end, one
            tensor in memory at a time beyond the file being filled.
        step: optimiser steps taken.
        next_sample: global sample number the next step begins with.
        tokens: valid target tokens seen.
        config: the resolved config.
        corpus: hash of the corpus index.
        versions: names and versions of what computed it.
        writes: whether this rank writes.
        max_file_bytes: a new file is begun beyond this size.

    Returns:
        the checkpoint's directory.

    Raises:
        StorageError: the disk refuses; nothing that was there before is lost.
    """
    final = root / checkpoint_name(step)
    if not writes:
        for _ in tensors:
            pass
        return final
    temporary = root / f".{final.name}.{os.getpid()}.tmp"
    failure: OSError | None = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        temporary.mkdir()
    except OSError as error:
        failure = error
    files: dict[str, dict[str, Any]] = {}
    index: dict[str, dict[str, str]] = {}
    pending: dict[str, torch.Tensor] = {}
    pending_section = ""
    pending_bytes = 0

    def flush() -> None:
        nonlocal failure, pending_bytes
        if not pending:
            return
        number = sum(name.startswith(f"{pending_section}-") for name in files)
        name = f"{pending_section}-{number:05d}.safetensors"
        if failure is None:
            try:
                files[name] = _write_tensors(temporary / name, pending)
            except OSError as error:
                failure = error  # the other ranks still communicate: go through the tensors first, then say it
        for logical in pending:
            index.setdefault(pending_section, {})[logical] = name
        pending.clear()
        pending_bytes = 0

    for section, logical, tensor in tensors:
        if section != pending_section or pending_bytes + tensor.nbytes > max_file_bytes:
            flush()
            pending_section = section
        # A copy: the iterator may reuse its buffer, and safetensors refuses tensors that share memory.
        pending[logical] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += tensor.nbytes
    flush()
    try:
        if failure is not None:
            raise failure
        manifest = Manifest(
            step=step, next_sample=next_sample, tokens=tokens, config=config, corpus=corpus, files=files, tensors=index, versions=versions
        )
        write_atomic(temporary / "manifest.json", manifest.to_json())
        _publish(temporary, final)
        write_atomic(root / "latest", final.name + "\n")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(
            f"cannot save {final}: {error.strerror or error}; earlier checkpoints are untouched, free some space and start the run again"
        ) from error
    except StorageError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def prune(root: Path, keep: int) -> list[Path]:
    """Remove all but the newest ``keep`` checkpoints; 0 keeps all. Returns what was removed."""
    if keep == 0:
        return []
    removed = sorted(root.glob("step-*"))[:-keep]
    for path in removed:
        # Take the manifest first: a half-removed directory must not look like a checkpoint.
        (path / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(path)
    return removed


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    save_file(tensors, path)
    with open(path, "rb") as f:
        os.fsync(f.fileno())
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def _publish(temporary: Path, final: Path) -> None:
    fsync_dir(temporary)
    if final.exists():
        # The same step again (a resumed run at its first save, or a damaged directory): a rename cannot replace a directory
        # that is not empty, so the old one steps aside for a moment and stays recoverable under its name until then.
        aside = final.with_name(f".{final.name}.{os.getpid()}.old")
        final.rename(aside)
        temporary.rename(final)
        shutil.rmtree(aside)
    else:
        temporary.rename(final)
    fsync_dir(final.parent)


def _remove_leftovers(root: Path) -> None:
    # Only the run's owner comes here, so whatever is still temporary belongs to an attempt that was killed.
    for path in root.glob(".step-*"):
        shutil.rmtree(path)
