"""Where this process stands among the ranks: the one place that reads a launcher's environment.

The deepspeed launcher and torchrun set RANK and WORLD_SIZE; srun sets SLURM_PROCID and its kin; without any of them the
process is alone.
"""

from __future__ import annotations

import ctypes
import os
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_llm.cluster.slurm import rank_environment
from dist_llm.comm.context import Group, ParallelContext
from dist_llm.utils.errors import LaunchError

__all__ = ["Launch", "close_context", "open_context", "read_launch", "tune_allocator"]

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
# Held-out evaluation or a checkpoint on a slow disk may keep one rank busy for minutes while the others wait in a collective.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Launch:
    """What the launcher said."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    job_id: str | None = None
    cpus: int = 1  # CPUs this rank may use

    @property
    def is_main(self) -> bool:
        """True on the rank that writes."""
        return self.rank == 0


def read_launch(env: Mapping[str, str] | None = None) -> Launch:
    """Read the launcher's variables.

    Raises:
        LaunchError: some of them are missing or make no sense.
    """
    env = os.environ if env is None else env
    cores = len(os.sched_getaffinity(0))
    if "RANK" in env and "WORLD_SIZE" in env:
        local_size = _integer(env, "LOCAL_WORLD_SIZE", _integer(env, "LOCAL_SIZE", 1))
        return Launch(
            launcher="torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed",
            rank=_integer(env, "RANK"),
            world_size=_integer(env, "WORLD_SIZE"),
            local_rank=_integer(env, "LOCAL_RANK", 0),
            local_size=local_size,
            master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_integer(env, "MASTER_PORT", 29500),
            job_id=env.get("SLURM_JOB_ID"),
            cpus=max(1, cores // local_size),
        )
    slurm = rank_environment(env)
    if slurm is not None:
        return Launch(
            launcher="srun",
            rank=slurm.rank,
            world_size=slurm.world_size,
            local_rank=slurm.local_rank,
            local_size=slurm.local_world_size,
            master_addr=slurm.master_addr,
            master_port=slurm.master_port,
            job_id=str(slurm.job_id),
            # Slurm does not always bind: without a binding every rank sees all cores of the node.
            cpus=_integer(env, "SLURM_CPUS_PER_TASK", max(1, cores // slurm.local_world_size)),
        )
    return Launch(launcher="none", cpus=cores, job_id=env.get("SLURM_JOB_ID"))


def open_context(launch: Launch, *, needs_process_group: bool, threads: int | None = None) -> ParallelContext:
    """Take the device, set the threads, meet the other ranks.

    Args:
        launch: from ``read_launch``.
        needs_process_group: make one even for a single rank (DeepSpeed wants it).
        threads: CPU threads of this rank; default its share of the cores.

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
    world = Group(rank=launch.rank, size=launch.world_size, handle=dist.group.WORLD)
    return ParallelContext(device=device, world=world, dp=world, local_rank=launch.local_rank, local_size=launch.local_size)


def close_context() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def tune_allocator() -> bool:
    """Keep freed memory in the process instead of giving it back to the kernel after every op; returns whether it was done.

    glibc maps each large tensor anew and unmaps it when freed, so eager training on CPU faults in every page of every
    activation at every step. With M_MMAP_MAX 0, a large M_TRIM_THRESHOLD and M_TOP_PAD the pages are reused
    (mallopt(3)). Peak memory is the same; it is only returned at exit.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, macOS: no mallopt, nothing to tune
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    return all(mallopt(key, value) == 1 for key, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 64 << 20)))


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            raise LaunchError(f"the launcher set RANK but not {name}; start with deepspeed, torchrun or srun")
        return default
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name}={text!r} is not a number; start with deepspeed, torchrun or srun") from None
