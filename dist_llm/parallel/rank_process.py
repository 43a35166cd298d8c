"""What one forked rank does: get ready, meet the others, run the program, answer, leave together.

It tells its caller what happened by lines in a pipe (``RANK done``, ``RANK raised``); everything larger is a file in the directory of the
call. A rank that has answered or raised stays until it is told to leave or is killed: were it to go at once, the others'
collectives would break, and their errors would hide the first cause.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import importlib
import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

__all__ = ["DUMP_SIGNAL", "FORCED_ENVIRONMENT", "die_with", "run_rank"]

# Writes the stacks of all threads, also while the main thread waits inside a collective. A real-time signal: programs
# may handle SIGUSR1 and SIGUSR2 themselves.
DUMP_SIGNAL = signal.SIGRTMIN + 5

# One thread until the rank asks for more: threads do not survive a fork. No CUDA: it cannot be used after a fork, and ranks of one
# machine are CPU ranks.
FORCED_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",  # the ranks share a machine: no need for its name to resolve or for a network
}

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` (a process id) ends, however it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(1)


def run_rank(rank: int, directory: Path, notices: int, leave: int) -> None:
    """Be ``rank`` of the call in ``directory``, to the end; the forked process must exit when this returns.

    Args:
        rank: in the world.
        directory: ``call.json`` and ``arguments`` are read; ``answer-R``, ``error-R.json``, ``output-R`` and ``stacks-R`` are written.
        notices: pipe for ``RANK done`` and ``RANK raised``.
        leave: pipe that ends when all have answered.
    """
    _redirect_output(directory / f"output-{rank}")
    stacks = open(directory / f"stacks-{rank}", "w", encoding="utf-8")  # noqa: SIM115  # for the signal handlers, as long as we live
    faulthandler.enable(stacks)
    faulthandler.register(DUMP_SIGNAL, stacks, all_threads=True)
    try:
        _run_program(rank, directory)
        kind = "done"
    except BaseException as error:  # noqa: BLE001  # an exit or an interrupt that the program raises is a failure of this rank as well
        kind = "raised"
        what = "".join(traceback.format_exception_only(error)).strip()
        said = {"time": time.monotonic(), "error": what, "traceback": "".join(traceback.format_exception(error))}
        (directory / f"error-{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    _flush_output()
    os.write(notices, f"{rank} {kind}\n".encode())
    os.read(leave, 1)
    if kind == "done":
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        _flush_output()


def _run_program(rank: int, directory: Path) -> None:
    call = json.loads((directory / "call.json").read_text(encoding="utf-8"))
    sys.path[:] = call["sys_path"]
    os.chdir(call["cwd"])
    os.environ.clear()
    os.environ.update(call["environ"] | FORCED_ENVIRONMENT)
    program = _resolve(call["module"], call["program"])

    import torch
    import torch.distributed as dist

    from dist_llm.comm.build import build_context
    from dist_llm.parallel.transport import load_value, save_value
    from dist_llm.topology.grid import RankGrid

    torch.set_num_threads(call["threads"])
    args, kwargs = load_value(directory / "arguments")
    grid = RankGrid(call["sizes"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=grid.size,
        timeout=timedelta(seconds=call["deadline_s"]),
    )
    ctx = build_context(grid, rank, torch.device("cpu"), kv_heads=call["kv_heads"], local_rank=rank, local_size=grid.size)
    answer = program(ctx, *args, **kwargs)
    save_value(answer, directory / f"answer-{rank}")


def _resolve(module: str, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


def _redirect_output(path: Path) -> None:
    # By descriptor, so that what C++ prints comes along.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # the program closed it
            stream.flush()
