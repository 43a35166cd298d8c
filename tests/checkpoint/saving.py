"""Small checkpoints, and children that save them and die."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dist_llm.checkpoint import save as save_module
from dist_llm.checkpoint.load import Checkpoint
from dist_llm.checkpoint.manifest import SECTIONS
from dist_llm.checkpoint.save import save_checkpoint

SHAPES = {"embedding.weight": (7, 5), "blocks.0.norm.weight": (5,), "blocks.0.mlp.up.weight": (11, 5), "scale": (), "none": (0, 3)}


def make_tensors(seed: int) -> list[tuple[str, str, torch.Tensor]]:
    """Three sections of odd shapes with odd values: not a number, infinity, minus zero and the smallest number are kept as they are."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        (section, name, torch.randn(shape, generator=generator).mul(10.0 ** (seed % 30)))
        for section in SECTIONS
        for name, shape in SHAPES.items()
    ]
    tensors[0][2].view(-1)[:5] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 1e-45])
    return tensors


def save(root: Path, step: int, *, seed: int | None = None, tensors: Any = None, writes: bool = True, max_file_bytes: int = 150) -> Path:
    """Save the tensors of ``seed`` (default ``step``) in several small files."""
    return save_checkpoint(
        root,
        make_tensors(step if seed is None else seed) if tensors is None else tensors,
        step=step,
        next_sample=8 * step,
        tokens=511 * step,
        config={"name": "tiny", "optim": {"lr": 1e-3}, "model": {"bias": False, "num_kv_heads": None}},
        corpus="c0ffee",
        versions={"torch": torch.__version__},
        writes=writes,
        max_file_bytes=max_file_bytes,
    )


def holds(checkpoint: Checkpoint, seed: int) -> bool:
    """Whether every tensor of ``seed`` is in ``checkpoint``, bit for bit, and nothing else."""
    expected = {(section, name): tensor for section, name, tensor in make_tensors(seed)}
    found = {(section, name): tensor for section in SECTIONS for name, tensor in checkpoint.tensors(section)}
    return found.keys() == expected.keys() and all(same_bits(found[key], expected[key]) for key in expected)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes: also for values that are not equal to themselves."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def names(root: Path) -> list[str]:
    """Everything under ``root``, hidden or not."""
    return sorted(path.name for path in root.iterdir())


def in_child(action: Callable[[], None], *, deadline_s: int = 30) -> int:
    """Run ``action`` in a forked child; its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(deadline_s)
            torch.set_num_threads(1)
            action()
            status = 0
        finally:  # the child must never return into the test that forked it
            if status:
                traceback.print_exc(file=sys.__stderr__)
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Everything by which a save changes the disk; Path's methods and shutil.rmtree go through these too.
_OS_CALLS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


def die_at_call(number: int, *, when: str) -> Callable[[], int]:
    """In a child: let the process kill itself ``when`` ("before" or "after") its ``number``-th call that changes the disk.

    Writing a file of tensors is such a call, too, and "before" leaves half of the file.

    Returns:
        a function that says how many calls there have been.
    """
    calls = 0

    def counted(original: Callable[..., Any], half_done: Callable[..., None] | None = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            mine = calls
            if mine == number and when == "before":
                if half_done is not None:
                    half_done(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return original(*args, **kwargs)
            finally:
                if mine == number and when == "after":
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    original_save_file = save_module.save_file

    def half_a_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        original_save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    for name in _OS_CALLS:
        setattr(os, name, counted(getattr(os, name)))
    save_module.save_file = counted(original_save_file, half_a_file)
    return lambda: calls


def count_calls(action: Callable[[], None]) -> int:
    """How many calls that change the disk ``action`` makes; counted in a child, which does it."""
    read, write = os.pipe()

    def counting() -> None:
        calls = die_at_call(0, when="never")
        action()
        os.write(write, str(calls()).encode())

    assert in_child(counting) == 0
    os.close(write)
    with os.fdopen(read) as f:
        return int(f.read())


def kill_at_every_call(action: Callable[[], None], *, prepare: Callable[[], None]) -> Iterator[str]:
    """Run ``action`` in one child after the other, each killed at another call; yields after each, with the moment.

    Args:
        action: changes the disk.
        prepare: puts the disk into the state that ``action`` begins with.
    """
    prepare()
    num_calls = count_calls(action)
    for number in range(1, num_calls + 1):
        for when in ("before", "after"):

            def dying(number: int = number, when: str = when) -> None:
                die_at_call(number, when=when)
                action()

            prepare()
            status = in_child(dying)
            assert status == -signal.SIGKILL, f"{when} call {number} of {num_calls}: the child ended with {status}"
            yield f"{when} call {number} of {num_calls}"
