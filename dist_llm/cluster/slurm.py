"""What a Slurm step says about its ranks: plain functions of the environment, no scontrol and no network.

``srun`` starts every rank of a step with SLURM_* variables that already hold rank, world size and host names. Reading
them makes an ssh, a hostfile or an mpirun unnecessary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dist_llm.utils.errors import LaunchError

__all__ = ["RankEnv", "expand_nodelist", "expand_tasks_per_node", "port_for_job", "rank_environment"]

# Below the ephemeral ports of Linux (32768 and up), which any outgoing connection may hold, and above Slurm's own.
FIRST_PORT = 12000
NUM_PORTS = 18000

# Slurm numbers its internal steps (batch shell, extern, interactive shell) from the top of 32 bits.
FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class RankEnv:
    """One rank's place in a Slurm step, and where the ranks meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    job_id: int
    restart_count: int  # how often Slurm has requeued the job


def rank_environment(env: Mapping[str, str]) -> RankEnv | None:
    """The rank that ``srun`` started this process as, or None when no ``srun`` step did.

    The shell of a batch script or of ``salloc`` has SLURM_PROCID too, but belongs to no step of ours: None.
    The meeting point is the first node of the step and a port made from the job's number; MASTER_ADDR and MASTER_PORT
    win where they are set (a second network, or node names that do not resolve).

    Raises:
        LaunchError: the variables are there but make no sense.
    """
    if "SLURM_PROCID" not in env or "SLURM_JOB_ID" not in env:
        return None
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID"))
    if step is None or _number("SLURM_STEP_ID", step) >= FIRST_SPECIAL_STEP:
        return None
    rank = _read(env, "SLURM_PROCID")
    world_size = _read(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    local_rank = _read(env, "SLURM_LOCALID")
    node = _read(env, "SLURM_NODEID")
    job_id = _read(env, "SLURM_JOB_ID")
    tasks = expand_tasks_per_node(_text(env, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    if node >= len(tasks):
        raise LaunchError(f"SLURM_NODEID is {node}, but the step has tasks on {len(tasks)} nodes only: {tasks}; start the ranks with srun")
    if rank >= world_size or sum(tasks) != world_size or local_rank >= tasks[node]:
        raise LaunchError(
            f"Slurm's variables disagree: SLURM_PROCID {rank} of {world_size} tasks, SLURM_LOCALID {local_rank}, tasks per node {tasks}; "
            "start the ranks with srun and do not set SLURM_* by hand"
        )
    return RankEnv(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=tasks[node],
        master_addr=env.get("MASTER_ADDR") or _first_node(_text(env, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")),
        master_port=_master_port(env, job_id),
        job_id=job_id,
        restart_count=_number("SLURM_RESTART_COUNT", env.get("SLURM_RESTART_COUNT", "0")),
    )


def port_for_job(job_id: int) -> int:
    """A port all ranks of a job derive alike; jobs that run at the same time on one node get different ones."""
    return FIRST_PORT + job_id % NUM_PORTS


def expand_tasks_per_node(text: str) -> list[int]:
    """``"2(x2),1"`` is ``[2, 2, 1]``: tasks on each node of a step, in the order of its node list.

    Raises:
        LaunchError: ``text`` is not of that form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part.strip())
        if match is None:
            raise LaunchError(f"cannot read '{text}' as tasks per node; Slurm writes it like '2(x3),1'")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_nodelist(text: str) -> list[str]:
    """Host names of a Slurm list: ``"n[1-3,07-09],m1"`` is n1 n2 n3 n07 n08 n09 m1, as ``scontrol show hostnames`` says.

    Several brackets in a name multiply, the last one running fastest; a number written with leading zeros keeps its width.

    Raises:
        LaunchError: a bracket is not closed, or a range is empty or backwards.
    """
    # A comma inside brackets is one that meets a closing bracket before an opening one.
    names = re.split(r",(?![^\[]*\])", text)
    return [host for name in names if name.strip() for host in _expand_name(name.strip(), text)]


def _expand_name(name: str, whole: str) -> list[str]:
    hosts = [""]
    for literal, ranges in re.findall(r"([^\[\]]+)|(\[[^\[\]]*\])", name):
        ends = _expand_ranges(ranges[1:-1], whole) if ranges else [literal]
        hosts = [host + end for host in hosts for end in ends]
    if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]*\])+", name):
        raise LaunchError(f"the node list '{whole}' has a bracket without its partner in '{name}'; Slurm writes it like 'n[1-3,07-09],m1'")
    return hosts


def _expand_ranges(text: str, whole: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise LaunchError(f"the node list '{whole}' has the range '{part}'; a range is a number or FIRST-LAST, as in 'n[1-3,07-09]'")
        numbers += [f"{number:0{len(match[1])}d}" for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return numbers


def _first_node(text: str) -> str:
    hosts = expand_nodelist(text)
    if not hosts:
        raise LaunchError(f"the step's node list '{text}' names no node; start the ranks with srun")
    return hosts[0]


def _master_port(env: Mapping[str, str], job_id: int) -> int:
    if not env.get("MASTER_PORT"):
        return port_for_job(job_id)
    port = _number("MASTER_PORT", env["MASTER_PORT"])
    if not 1 <= port <= 65535:
        raise LaunchError(f"MASTER_PORT is {port}; a port is between 1 and 65535, or leave it unset to have one made from the job's number")
    return port


def _text(env: Mapping[str, str], *names: str) -> str:
    for name in names:
        if env.get(name):
            return env[name]
    raise LaunchError(f"{names[0]} is not set though this is a Slurm step; start the ranks with srun")


def _read(env: Mapping[str, str], *names: str) -> int:
    return _number(names[0], _text(env, *names))


def _number(name: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]+", value):
        raise LaunchError(f"{name} is '{value}', not a number; start the ranks with srun and do not set SLURM_* by hand")
    return int(value)
