"""A real Slurm of two nodes on this machine: munge, slurmctld and two slurmd, all private to one temporary directory.

The daemons listen on free ports and know nothing of a Slurm the machine may have. Every process of the cluster, jobs
included, carries ``SLURM_CONF=<our file>`` in its environment, so ending the cluster is ending exactly those. A reaper
process holds a pipe from pytest and does the same when pytest dies without cleaning up, however it dies.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("n1", "n2")
COMMAND_TIMEOUT_S = 20.0
START_TIMEOUT_S = 30.0

# The nodes of partition gpu have no daemon and run nothing: in state CLOUD the scheduler takes them as they are declared,
# so that `sbatch --test-only` can say whether a request for GPUs would be accepted.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ctld_port}
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmctldPidFile={dir}/slurmctld.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdSpoolDir={dir}/spool-%n
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,batch_sched_delay=1,sched_interval=1
JobRequeue=1
ReturnToService=2
KillWait=5
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={dir}/jobcomp.log
MailProg=/bin/true
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=INFINITE
GresTypes=gpu
{nodes}
NodeName=g[1-2] NodeHostname=nowhere NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000000 Gres=gpu:8 State=CLOUD
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=g[1-2] MaxTime=INFINITE State=UP
"""
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"
GRES_CONF = "NodeName=g[1-2] Name=gpu Count=8\n"


def missing_programs() -> list[str]:
    """Programs the cluster needs that this machine lacks."""
    return [name for name in PROGRAMS if _program(name) is None]


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str, report: Callable[[], str] = str) -> None:
    """Poll ``condition``; after ``timeout_s`` fail with ``what`` was awaited and what ``report`` says then."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s for {what}\n{report()}")
        time.sleep(0.1)


class SlurmCluster:
    """The cluster, from ``start`` to ``stop``."""

    def __init__(self) -> None:
        # Below /tmp and not in pytest's folder: the path of a Unix socket has at most 107 characters.
        self.dir = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.dir.chmod(0o755)  # munged wants its socket reachable; its key stays private
        self.conf = self.dir / "slurm.conf"
        # No SLURM_* of a job that runs the tests may reach the jobs of ours.
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "SQUEUE", "MASTER_"))}
        self.env["SLURM_CONF"] = str(self.conf)
        self._reaper: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        self._write_files()
        # In a session of its own, so that Ctrl-C at the terminal reaches pytest and not the reaper.
        self._reaper = subprocess.Popen([sys.executable, __file__, str(self.dir)], stdin=subprocess.PIPE, start_new_session=True, cwd="/")
        files = {option: self.dir / f"munge.{option}" for option in ("socket", "pid", "log", "seed")}
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={self.dir / 'munge.key'}", f"--socket={files['socket']}",
            f"--pid-file={files['pid']}", f"--log-file={files['log']}", f"--seed-file={files['seed']}",
        )  # fmt: skip
        wait_until(files["socket"].exists, timeout_s=START_TIMEOUT_S, what="munged", report=self.logs)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node, name=f"slurmd-{node}")
        wait_until(self._is_idle, timeout_s=START_TIMEOUT_S, what="both nodes to be idle", report=self.logs)

    def stop(self) -> None:
        """End every process of the cluster, jobs included, and remove its files."""
        if self._reaper is not None:
            assert self._reaper.stdin is not None
            self._reaper.stdin.close()
            self._reaper.wait(COMMAND_TIMEOUT_S)
        shutil.rmtree(self.dir, ignore_errors=True)

    def command(self, *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Standard output of a Slurm command; a failure shows its standard error."""
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False, env=self.env | dict(env or {}), cwd=cwd
        )
        assert done.returncode == 0, f"{' '.join(words)} returned {done.returncode}: {done.stderr}"
        return done.stdout + (done.stderr if "--test-only" in words else "")

    def submit(self, *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> int:
        """Number of the job that ``sbatch words`` starts."""
        return int(self.command("sbatch", "--parsable", *words, env=env, cwd=cwd).strip())

    def job(self, job: int) -> dict[str, str]:
        """What ``scontrol show job`` says, as a dictionary."""
        # Values may hold spaces, so a key is what stands right before an equals sign at the start of a word.
        text = self.command("scontrol", "--oneliner", "show", "job", str(job))
        return {m[1]: m[2] for m in re.finditer(r"(?:^|\s)([A-Za-z:/]+)=(.*?)(?=\s[A-Za-z:/]+=|\s*$)", text)}

    def wait_for(self, job: int, states: Sequence[str], *, timeout_s: float = 60.0) -> dict[str, str]:
        """Wait until ``job`` is in one of ``states`` and return what Slurm says of it."""
        seen: dict[str, str] = {}

        def arrived() -> bool:
            seen.update(self.job(job))
            return seen["JobState"] in states

        wait_until(arrived, timeout_s=timeout_s, what=f"job {job} to be {' or '.join(states)}", report=lambda: f"{seen}\n{self.logs()}")
        return seen

    def start_now(self, job: int) -> None:
        """Spare a requeued job the two minutes Slurm lets it wait."""
        # Not the same second: slurmd refuses a job whose credential is not younger than the requeue that revoked the last one.
        self.command("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        paths = sorted(self.dir.glob("*.log"))
        return "\n".join(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]) for path in paths)

    def _is_idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"],
            capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False, env=self.env,
        )  # fmt: skip
        return done.stdout.split() == ["idle"] * len(NODES)

    def _write_files(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.dir / name).mkdir()
        key = self.dir / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        host = socket.gethostname().split(".")[0]
        ctld_port, *node_ports = _free_ports(1 + len(NODES))
        nodes = (
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
            for node, port in zip(NODES, node_ports, strict=True)
        )
        self.conf.write_text(
            SLURM_CONF.format(dir=self.dir, host=host, user=getpass.getuser(), ctld_port=ctld_port, nodes="\n".join(nodes))
        )
        (self.dir / "cgroup.conf").write_text(CGROUP_CONF)
        (self.dir / "gres.conf").write_text(GRES_CONF)

    def _daemon(self, program: str, *words: str, name: str | None = None) -> None:
        path = _program(program)
        assert path is not None
        with (self.dir / f"{name or program}.out.log").open("wb") as out:
            subprocess.Popen(
                [path, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.env, start_new_session=True, cwd="/"
            )


def processes_of(directory: Path) -> list[int]:
    """Processes that carry the cluster of ``directory`` in their environment: its daemons, and the jobs' shells and ranks."""
    mark = f"SLURM_CONF={directory / 'slurm.conf'}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        # A process may end, or belong to somebody else, between listing and reading.
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and int(entry.name) != os.getpid() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def end_processes_of(directory: Path) -> None:
    """Kill until none is left: a daemon may start one more while it is being killed."""
    deadline = time.monotonic() + COMMAND_TIMEOUT_S / 2
    while (pids := processes_of(directory)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _program(name: str) -> str | None:
    # Debian keeps daemons in /usr/sbin, which is not on every user's PATH.
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def _free_ports(count: int) -> list[int]:
    # All sockets stay open until all ports are known, so that none is handed out twice.
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


if __name__ == "__main__":  # the reaper: pytest's end of the pipe closes when it stops the cluster, and when it dies
    sys.stdin.read()
    end_processes_of(Path(sys.argv[1]))
    shutil.rmtree(sys.argv[1], ignore_errors=True)
