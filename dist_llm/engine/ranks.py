"""Where this process stands among the ranks: the one place that reads a launcher's environment. No torch: it must answer at once.

The deepspeed launcher and torchrun set RANK and WORLD_SIZE; srun sets SLURM_PROCID and its kin; without any of them the
process is alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dist_llm.cluster.slurm import rank_environment
from dist_llm.utils.errors import LaunchError

__all__ = ["Launch", "read_launch"]


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
