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
from safetensors import SafetensorError
from safetensors.torch import save_file

from dist_llm.checkpoint.manifest import Manifest
from dist_llm.checkpoint.names import checkpoint_name, final_of, list_checkpoints, list_recoverable, name_aside, name_temporary
from dist_llm.utils.errors import StorageError
from dist_llm.utils.files import fsync_dir, sha256_file, write_atomic

__all__ = ["checkpoint_name", "prune", "save_checkpoint"]

MAX_FILE_BYTES = 4 << 30


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
    temporary = root / name_temporary(final.name, os.getpid())
    failure: OSError | StorageError | None = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        fsync_dir(root.parent)
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
            except (OSError, StorageError) as error:
                failure = error  # the other ranks still communicate: go through the tensors first, then say it
        for logical in pending:
            index.setdefault(pending_section, {})[logical] = name
        pending.clear()
        pending_bytes = 0

    for section, logical, tensor in tensors:
        if section != pending_section or pending_bytes + tensor.nbytes > max_file_bytes:
            flush()
            pending_section = section
        assert logical not in pending and logical not in index.get(section, {}), f"{section} {logical} came twice"
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
    except (OSError, StorageError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        cause = (error.strerror or error) if isinstance(error, OSError) else error
        raise StorageError(
            f"cannot save {final}: {cause}; earlier checkpoints are untouched, free some space and start the run again"
        ) from error
    return final


def prune(root: Path, keep: int) -> list[Path]:
    """Remove all but the newest ``keep`` checkpoints; 0 keeps all. Returns what was removed.

    Newest means up to the one saved last, which ``latest`` names: a run that passed over damaged later checkpoints goes on below
    them, and they must neither count as kept nor push out what it saves now. They are replaced when the run gets there.

    Raises:
        StorageError: one cannot be removed.
    """
    if keep == 0:
        return []
    removed = _up_to_latest(root)[:-keep]
    for path in removed:
        try:
            # Take the manifest first: a half-removed directory must not look like a checkpoint.
            (path / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(path)
        except OSError as error:
            raise StorageError(
                f"cannot remove the old checkpoint {path}: {error.strerror or error}; remove it by hand, or set checkpoint.keep=0 to keep all"
            ) from error
    return removed


def _up_to_latest(root: Path) -> list[Path]:
    directories = list_checkpoints(root)
    try:
        latest = (root / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return directories  # the hint is gone or unreadable, and only a hint: the listing is the truth
    names = [path.name for path in directories]
    return directories[: names.index(latest) + 1] if latest in names else directories


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # what its writer makes of a full disk: not an OSError
        raise StorageError(str(error)) from error
    with open(path, "rb") as f:
        os.fsync(f.fileno())
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def _publish(temporary: Path, final: Path) -> None:
    fsync_dir(temporary)
    if final.exists():
        # The same step again (a run that passed over a damaged checkpoint and got there again): a rename cannot replace a
        # directory that is not empty, so the old one steps aside, where find_checkpoint still sees it, until the new one stands.
        aside = final.with_name(name_aside(final.name, os.getpid()))
        final.rename(aside)
        try:
            temporary.rename(final)
        except OSError:
            aside.rename(final)
            raise
        fsync_dir(final.parent)
        shutil.rmtree(aside)
    else:
        temporary.rename(final)
    fsync_dir(final.parent)


def _remove_leftovers(root: Path) -> None:
    # Only the run's owner comes here, so whatever is hidden belongs to an attempt that was killed. A checkpoint it had moved aside
    # goes back to its place; all else was never finished.
    for path in list_recoverable(root):
        if path.name.startswith("."):
            path.rename(final_of(path))
    for path in root.glob(".step-*"):
        shutil.rmtree(path)
