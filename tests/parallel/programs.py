"""What the ranks of test_ranks.py do: top-level functions, since ranks import them by name."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.comm.context import Group, ParallelContext

NOT_A_FUNCTION_OF_ITS_OWN = [lambda ctx: ctx.world.rank]


def rank_and_arguments(ctx: ParallelContext, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"rank": ctx.world.rank, "size": ctx.world.size, "args": args, "kwargs": kwargs}


def sums_over_groups(ctx: ParallelContext) -> dict[str, float]:
    """10^rank summed over each group: the digits say who took part."""

    def total(group: Group) -> float:
        value = torch.tensor([10.0**ctx.world.rank], dtype=torch.float64)
        if group.size > 1:
            dist.all_reduce(value, group=group.handle)
        return value.item()

    return {name: total(getattr(ctx, name)) for name in ("world", "tp", "cp", "dp", "pp", "zero", "model", "kv")}


def double(ctx: ParallelContext, value: dict[str, Any]) -> dict[str, Any]:
    del ctx
    return {**value, "doubled": value["tensor"] * 2}


def lambda_answer(ctx: ParallelContext) -> Any:
    return lambda: ctx


def _num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def threads_in_use(ctx: ParallelContext) -> tuple[int, int, int]:
    """Threads of the process before and after a matrix product large enough to share, and how many torch may use."""
    del ctx
    before = _num_threads()
    x = torch.ones(600, 600)
    (x @ x).sum().item()
    torch.exp(torch.ones(1 << 20)).sum().item()
    return before, _num_threads(), torch.get_num_threads()


def surroundings(ctx: ParallelContext) -> dict[str, Any]:
    del ctx
    return {
        "cwd": str(Path.cwd()),
        "variable": os.environ.get("DIST_LLM_TEST_VARIABLE"),
        "cuda": torch.cuda.is_available(),
        "pid": os.getpid(),
    }


def loaded_before(ctx: ParallelContext) -> list[str]:
    del ctx
    return [name for name in ("torch._dynamo", "deepspeed") if name in sys.modules]


def speak(ctx: ParallelContext) -> None:
    print(f"hello from {ctx.world.rank}")
    print("and on stderr", file=sys.stderr)


def _write_pid(ctx: ParallelContext, directory: Path) -> None:
    (directory / f"pid-{ctx.world.rank}").write_text(str(os.getpid()))


def barrier_forever(ctx: ParallelContext) -> None:
    del ctx
    while True:
        dist.barrier()


def one_raises(ctx: ParallelContext, directory: Path, culprit: int, after_s: float = 0.0) -> None:
    _write_pid(ctx, directory)
    if ctx.world.rank == culprit:
        time.sleep(after_s)
        print("about to raise")
        raise KeyError("the missing thing")
    barrier_forever(ctx)


def all_raise_in_turn(ctx: ParallelContext) -> None:
    """The highest rank first."""
    dist.barrier()
    time.sleep(0.05 * (ctx.world.size - ctx.world.rank))
    raise ValueError(f"from {ctx.world.rank}")


def one_exits(ctx: ParallelContext, directory: Path, culprit: int, status: int) -> None:
    _write_pid(ctx, directory)
    if ctx.world.rank == culprit:
        os._exit(status)
    barrier_forever(ctx)


def one_signals_itself(ctx: ParallelContext, directory: Path, culprit: int, signum: int) -> None:
    """SIGKILL, SIGSTOP and SIGSEGV at a moment when the others are inside a collective."""
    _write_pid(ctx, directory)
    dist.barrier()
    if ctx.world.rank == culprit:
        time.sleep(0.1)
        os.kill(os.getpid(), signum)
    barrier_forever(ctx)


def one_sleeps(ctx: ParallelContext, directory: Path, culprit: int) -> None:
    _write_pid(ctx, directory)
    if ctx.world.rank == culprit:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    dist.all_reduce(torch.ones(1))


def one_leaves_a_collective_out(ctx: ParallelContext, directory: Path, culprit: int) -> None:
    _write_pid(ctx, directory)
    if ctx.world.rank != culprit:
        dist.all_reduce(torch.ones(1))


def with_workers(ctx: ParallelContext, directory: Path) -> None:
    """A rank that forks a worker and then hangs."""
    _write_pid(ctx, directory)
    worker = os.fork()
    if worker == 0:
        time.sleep(1000)
        os._exit(0)
    (directory / f"pid-worker-{ctx.world.rank}").write_text(str(worker))
    time.sleep(1000)


def at_random_one_fails(ctx: ParallelContext, directory: Path, culprit: int, how: str, after_s: float) -> None:
    """Collectives of many sizes, until one rank fails in the way named."""
    _write_pid(ctx, directory)
    start = time.monotonic()
    size = 1
    while True:
        if ctx.world.rank == culprit and time.monotonic() - start > after_s:
            if how == "raise":
                raise RuntimeError("at a random moment")
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        size = size * 7 % 10_007
        dist.all_reduce(torch.ones(size))
