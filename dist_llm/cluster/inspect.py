"""What this machine offers: cores, memory, disk, launchers, Slurm. Every question is answered, in bounded time, on every machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LAUNCHERS", "Slurm", "available_cores", "available_memory", "free_disk", "launcher_path", "slurm"]

LAUNCHERS = ("deepspeed", "torchrun", "srun")
SLURM_TIMEOUT_S = 5.0


def available_cores() -> int:
    """Cores this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes a process could still take: what the machine has free, or what its control group leaves if that is less.

    None where the system does not say.
    """
    candidates = []
    try:
        for line in proc.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                candidates.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass  # not Linux
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            candidates.append(int(limit) - int((cgroup / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass  # no control group, or one of another version: the machine's own figure stands
    return min(candidates, default=None)


def free_disk(path: Path) -> int:
    """Bytes a user can still write under ``path``.

    Raises:
        OSError: the path is not there or not readable.
    """
    return shutil.disk_usage(path).free


def launcher_path(name: str, bin_dir: Path) -> str | None:
    """Where a launcher is: beside this Python first, then on PATH."""
    return shutil.which(name, path=os.pathsep.join([str(bin_dir), os.environ.get("PATH", "")]))


@dataclass(frozen=True)
class Slurm:
    """Slurm as seen from here.

    Attributes:
        version: for example ``slurm-wlm 22.05.8``; None when its commands are not installed.
        reachable: the controller answered.
        why_not: why it is not usable, or None.
    """

    version: str | None
    reachable: bool
    why_not: str | None


def _ask(command: list[str], timeout_s: float) -> tuple[int, str]:
    # Slurm's commands wait without end for a daemon that is down, so each has a deadline.
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s, check=False
    )
    return done.returncode, done.stdout.decode("utf-8", "replace").strip()


def slurm(timeout_s: float = SLURM_TIMEOUT_S) -> Slurm:
    """Ask Slurm for its version and its controller for an answer."""
    if shutil.which("srun") is None or shutil.which("scontrol") is None:
        return Slurm(None, False, "srun and scontrol are not on PATH; training on this machine alone does not need them")
    version = None
    try:
        status, version = _ask(["srun", "--version"], timeout_s)
        if status != 0:
            last = version.splitlines()[-1] if version else "no message"
            return Slurm(None, False, f"installed, but srun --version failed with status {status}: {last}")
        status, answer = _ask(["scontrol", "ping"], timeout_s)
    except subprocess.TimeoutExpired as error:
        return Slurm(version, False, f"{' '.join(error.cmd)} gave no answer in {timeout_s:g} s; is slurmctld running?")
    except OSError as error:
        return Slurm(version, False, f"Slurm's commands do not run: {error}")
    if status != 0 or "UP" not in answer:
        first = answer.splitlines()[0] if answer else f"status {status}"
        return Slurm(version, False, f"the controller is not reachable: {first}")
    return Slurm(version, True, None)
