"""What rank 0 settles about a run directory before anything is computed: is it ours, is it this run, where does it go on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dist_llm import __version__
from dist_llm.checkpoint.load import Checkpoint, find_checkpoint, open_checkpoint
from dist_llm.config.load import diff_configs
from dist_llm.config.schema import RunConfig
from dist_llm.config.write import dump_yaml
from dist_llm.data.index import Index
from dist_llm.engine.ranks import Launch
from dist_llm.utils.errors import ConfigError, NoCheckpointError, StorageError
from dist_llm.utils.files import sha256_bytes, write_atomic, write_json

__all__ = ["Start", "checkpoint_at", "corpus_hash", "decide_start", "same_run", "versions", "write_description"]

# What may change between two attempts of one run: how it is watched, saved and divided, never what it computes.
_FREE = ("name", "run_dir", "eval.", "checkpoint.", "log.", "kernels.", "parallel.", "train.engine", "train.threads", "train.resume",
         "train.micro_batch_size", "data.path")  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where an attempt begins: from the checkpoint of ``step``, or from scratch."""

    checkpoint: str | None  # directory
    step: int
    next_sample: int
    tokens: int
    notes: list[str]  # what a person should know about the choice


def same_run(old: RunConfig, new: RunConfig) -> list[str]:
    """The differences that would make going on with ``old``'s checkpoint another run, one sentence each."""
    differences = []
    for key, before, now in diff_configs(old, new):
        if key.startswith(_FREE) or (key == "train.steps" and new.optim.schedule == "constant"):
            continue
        differences.append(f"{key}: {before!r} in the checkpoint, {now!r} now")
    return differences


def corpus_hash(index: Index) -> str:
    """Hash of what the numbers of a run depend on in a corpus: its tokenizer and the bytes of its shards, in order."""
    parts = [index.tokenizer.sha256]
    for name in sorted(index.splits):
        parts += [name, *(shard.sha256 for shard in index.splits[name].shards)]
    return sha256_bytes("\n".join(parts).encode())


def decide_start(root: Path, config: RunConfig, corpus: str) -> Start:
    """Look at the checkpoints under ``root`` and say where to begin.

    Raises:
        NoCheckpointError: train.resume=must and there is none; or there are only damaged ones.
        ConfigError: the checkpoints belong to another run, or train.resume=never and there are some.
    """
    found, problems = find_checkpoint(root)
    mode = config.train.resume
    if found is None:
        if problems:
            raise NoCheckpointError(
                f"{root} has no valid checkpoint: {'; '.join(problems)}. "
                "Restore a copy, or remove the damaged directories to start from the beginning"
            )
        if mode == "must":
            raise NoCheckpointError(f"train.resume is 'must', but there is no checkpoint under {root}; check run_dir, or use resume=auto")
        return Start(checkpoint=None, step=0, next_sample=0, tokens=0, notes=[])
    if mode == "never":
        raise ConfigError(
            f"train.resume is 'never', but {found.directory} exists; give the run another name, remove the directory, or use resume=auto"
        )
    manifest = found.manifest
    try:
        differences = same_run(RunConfig.model_validate(manifest.config), config)
    except ValidationError as error:
        raise ConfigError(
            f"{found.directory} was written by dist_llm {manifest.versions.get('dist_llm')}, whose config this version does not read "
            f"({error.error_count()} keys differ); go on with that version, or give this run another name"
        ) from error
    if manifest.corpus != corpus:
        differences.append(f"the corpus: index {manifest.corpus[:12]} in the checkpoint, {corpus[:12]} now")
    if differences:
        listed = "".join(f"\n  {d}" for d in differences)
        raise ConfigError(
            f"{found.directory} belongs to another run:{listed}\n"
            "give this run another name (name=... or run_dir=...), or go back to the values of the checkpoint"
        )
    notes = [f"passing over a checkpoint: {p}" for p in problems]
    notes.append(f"going on from {found.directory} (step {manifest.step}, {manifest.tokens:,} tokens)")
    return Start(checkpoint=str(found.directory), step=manifest.step, next_sample=manifest.next_sample, tokens=manifest.tokens, notes=notes)


def checkpoint_at(start: Start, *, verify: bool = False) -> Checkpoint | None:
    """Open the checkpoint ``start`` names. Rank 0 has read every byte already; the others trust it."""
    return None if start.checkpoint is None else open_checkpoint(Path(start.checkpoint), verify=verify)


def versions() -> dict[str, str]:
    """What computes: our version, torch, DeepSpeed, Python."""
    answer = {"dist_llm": __version__, "python": platform.python_version()}
    for package in ("torch", "deepspeed", "numpy", "safetensors"):
        try:
            answer[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return answer


def write_description(run_dir: Path, config: RunConfig, launch: Launch, *, threads: int, kernels: dict[str, str], device: str) -> None:
    """Write config.resolved.yaml and env.json."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the run directory {run_dir}: {error.strerror}; choose another run_dir") from error
    write_atomic(run_dir / "config.resolved.yaml", dump_yaml(config))
    environment: dict[str, Any] = {
        "versions": versions(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "launcher": launch.launcher,
        "ranks": launch.world_size,
        "ranks_per_node": launch.local_size,
        "slurm_job": launch.job_id,
        "threads": threads,
        "device": device,
        "kernels": kernels,
    }
    write_json(run_dir / "env.json", json.loads(json.dumps(environment)))
