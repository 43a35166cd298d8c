"""Take the device, set the threads, meet the other ranks."""

from __future__ import annotations

import ctypes
import os
import socket
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_llm.comm.build import build_context
from dist_llm.comm.context import ParallelContext
from dist_llm.engine.ranks import Launch
from dist_llm.topology.grid import RankGrid
from dist_llm.utils.errors import LaunchError

__all__ = ["close_context", "open_context", "tune_allocator"]

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
# Held-out evaluation or a checkpoint on a slow disk may keep one rank busy for minutes while the others wait in a collective.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def open_context(
    launch: Launch,
    *,
    needs_process_group: bool,
    threads: int | None = None,
    grid: RankGrid | None = None,
    kv_heads: int | None = None,
) -> ParallelContext:
    """Take the device, set the threads, meet the other ranks.

    Args:
        launch: from ``read_launch``.
        needs_process_group: make one even for a single rank (DeepSpeed wants it).
        threads: CPU threads of this rank; default its share of the cores.
        grid: how the ranks are divided over axes; default all of them data parallel.
        kv_heads: key-value heads of the model, see ``build_context``.

    Raises:
        LaunchError: the ranks did not meet.
    """
    # torch 2.13 renames this collective; DeepSpeed calls it by the old name, on every rank at every step.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*deprecated.*", category=FutureWarning)
    torch.set_num_threads(threads if threads is not None else launch.cpus)
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if launch.world_size == 1 and not needs_process_group:
        return ParallelContext(device=device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]  # it is public
    else:
        where = f"{launch.master_addr}:{launch.master_port}"
        try:
            dist.init_process_group(
                backend,
                init_method=f"tcp://{where}",
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=RENDEZVOUS_TIMEOUT,
            )
        except (RuntimeError, ValueError) as error:
            raise LaunchError(
                f"rank {launch.rank} of {launch.world_size} on {socket.gethostname()} did not meet the others at {where} "
                f"({str(error).splitlines()[0]}); check that all ranks started, that the name resolves and that the port is free"
            ) from error
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)
    return build_context(
        grid if grid is not None else RankGrid({"tp": 1, "cp": 1, "dp": launch.world_size, "pp": 1}),
        launch.rank,
        device,
        kv_heads=kv_heads,
        local_rank=launch.local_rank,
        local_size=launch.local_size,
    )


def close_context() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def tune_allocator() -> bool:
    """Keep freed memory in the process instead of giving it back to the kernel after every op; returns whether it was done.

    glibc maps each large tensor anew and unmaps it when freed, so eager training on CPU faults in every page of every
    activation at every step. With M_MMAP_MAX 0, a large M_TRIM_THRESHOLD and M_TOP_PAD the pages are reused
    (mallopt(3)). Peak memory is the same; it is only returned at exit.

    Tensors of 2 MiB and more are also put on huge pages, where the kernel grants them on request (madvise): a matrix product walks
    down columns whose rows are pages apart, and the processor remembers few of them. torch reads its switch at its first allocation.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, macOS: no mallopt, nothing to tune
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    return all(mallopt(key, value) == 1 for key, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 64 << 20)))
