"""The fork server: one process that imports torch once and forks ranks on request.

A fork copies only the thread that asks for it, so the server must have no other: it imports and never computes. It forks, reaps and
kills for its owner, one call at a time, and ends with its owner; its ranks end with it. It lives in a session of its own, so
a Ctrl-C on the terminal reaches the owner alone.

Requests come as JSON over a socket pair: ``{"run": directory, "size": n}`` with two descriptors, ``{"signal": n, "ranks": […]}``.
What happens to the ranks goes as lines into the pipe of the call: ``RANK born PID`` and ``RANK died STATUS`` from here,
``RANK done`` and ``RANK raised`` from the ranks.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from dist_llm.parallel.rank_process import FORCED_ENVIRONMENT, die_with, run_rank
from dist_llm.utils.errors import LaunchError

__all__ = ["ForkServer"]

_START_LIMIT_S = 300.0  # torch from a cold network file system
_STOP_LIMIT_S = 10.0
_REAP_EVERY_S = 0.02
_OWNER_CHECK_EVERY_S = 1.0
_MAX_MESSAGE = 1 << 16

# _dynamo: the first step of any optimiser imports it, for a second or more. deepspeed: only if installed.
_PRELOADED = ("torch", "torch.distributed", "torch._dynamo", "dist_llm.comm.build", "dist_llm.parallel.transport")
_PRELOADED_IF_INSTALLED = ("deepspeed",)


class ForkServer:
    """The owner's end.

    Raises:
        LaunchError: it did not come up.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in stop
        # What this process can import, the server can.
        environment = os.environ | FORCED_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in sys.path)}
        command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(self.owner)]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def fileno(self) -> int:
        """Readable when the server has ended: after the start it never speaks on this socket."""
        return self._control.fileno()

    def is_alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process.poll() is None

    def run(self, directory: Path, size: int, notices: int, leave: int) -> None:
        """Fork ``size`` ranks for the call in ``directory``; see ``run_rank``. The descriptors stay the caller's to close."""
        self._send({"run": str(directory), "size": size}, [notices, leave])

    def signal(self, ranks: list[int], signum: int) -> None:
        """Send ``signum`` to the process groups of those of ``ranks`` that are alive."""
        self._send({"signal": int(signum), "ranks": ranks})

    def stop(self) -> None:
        """End it and all its ranks; returns when they are gone."""
        self._control.close()  # it kills its ranks when it sees the end of this socket
        try:
            self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its ranks go with it
            self._process.wait()
        self._log.close()

    def why_dead(self) -> str:
        """How it ended, with the end of what it printed."""
        status = self._process.wait(_STOP_LIMIT_S)
        self._log.seek(0)
        return f"{describe_status(status)}; it printed: {self._log.read()[-2000:].decode(errors='replace').strip() or 'nothing'}"

    def abandon(self) -> None:
        """In a process forked from the owner: close this copy and leave the server to its owner."""
        self._control.close()
        self._log.close()
        self._process.returncode = 0  # not this process's child to wait for

    def _wait_until_ready(self) -> None:
        if not select.select([self._control], [], [], _START_LIMIT_S)[0]:
            raise LaunchError(
                f"the process that forks ranks did not finish its imports within {_START_LIMIT_S:.0f} s; is the file system slow?"
            )
        said = self._control.recv(_MAX_MESSAGE)
        if not said:
            raise LaunchError(f"the process that forks ranks ended during its imports: {self.why_dead()}")
        threads = json.loads(said)["threads"]
        if threads != 1:
            raise LaunchError(
                f"the process that forks ranks has {threads} threads after importing {', '.join(_PRELOADED)} and DeepSpeed, and forking is safe "
                "with one only; look for a sitecustomize or an environment variable that starts threads"
            )

    def _send(self, request: dict[str, Any], descriptors: list[int] | None = None) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: fileno() is readable, the caller will see
            socket.send_fds(self._control, [json.dumps(request).encode()], descriptors or [])


def describe_status(status: int) -> str:
    """In words, from an exit status as subprocess has it (negative: a signal)."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-status}"


class _Server:
    def __init__(self, control: socket.socket, owner: int) -> None:
        self._control = control
        self._owner = owner
        self._ranks: dict[int, int] = {}  # process -> rank
        self._notices = -1
        self._directory = Path()

    def serve(self) -> None:
        """Until the owner is gone."""
        # Without DeepSpeed's and torch's objects in the young generation, a collection in a rank does not copy their pages.
        gc.collect()
        gc.freeze()
        self._control.send(json.dumps({"threads": len(list(Path("/proc/self/task").iterdir()))}).encode())
        try:
            # A process that the owner forked may hold the socket open: ask for the parent as well.
            while os.getppid() == self._owner:
                wait = _REAP_EVERY_S if self._ranks else _OWNER_CHECK_EVERY_S
                if select.select([self._control], [], [], wait)[0] and not self._answer_request():
                    return
                self._reap()
        finally:
            self._end()

    def _end(self) -> None:
        if not self._ranks:
            return
        self._kill(list(self._ranks.values()), signal.SIGKILL)
        for pid in self._ranks:
            os.waitpid(pid, 0)
        # A killed owner cannot; one that lives finds it done.
        shutil.rmtree(self._directory, ignore_errors=True)

    def _answer_request(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, _MAX_MESSAGE, 2)
        if not data:
            return False
        request = json.loads(data)
        if "run" in request:
            self._fork(Path(request["run"]), request["size"], *descriptors)
        else:
            self._kill(request["ranks"], request["signal"])
        return True

    def _fork(self, directory: Path, size: int, notices: int, leave: int) -> None:
        assert not self._ranks, "the owner asked for ranks while others were alive"
        server = os.getpid()
        self._notices = notices
        self._directory = directory
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                self._be_rank(rank, server, directory, notices, leave)
            with contextlib.suppress(PermissionError, ProcessLookupError):  # the rank does the same: whoever comes first
                os.setpgid(pid, pid)
            self._ranks[pid] = rank
            self._tell(f"{rank} born {pid}")
        os.close(leave)

    def _be_rank(self, rank: int, server: int, directory: Path, notices: int, leave: int) -> None:
        code = 70
        try:
            os.setpgid(0, 0)  # what the program starts is killed with it
            die_with(server)
            self._control.close()
            run_rank(rank, directory, notices, leave)
            code = 0
        except BaseException:  # noqa: BLE001  # a forked process must never return into the server's loop
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)  # the interpreter's own shutdown can abort in torch's static destructors

    def _reap(self) -> None:
        for pid, rank in list(self._ranks.items()):
            # Look without reaping: while the zombie is there, its process group's number cannot be given to others.
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # workers that the program forked and left
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            del self._ranks[pid]
            self._tell(f"{rank} died {status}")
        if not self._ranks and self._notices >= 0:
            os.close(self._notices)
            self._notices = -1

    def _kill(self, ranks: list[int], signum: int) -> None:
        for pid, rank in self._ranks.items():
            if rank in ranks:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signum)

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the owner has stopped listening; its end of the socket will tell
            os.write(self._notices, f"{line}\n".encode())


def _preload() -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    for name in _PRELOADED_IF_INSTALLED:
        if importlib.util.find_spec(name) is not None:
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001  # a broken optional package fails in the ranks that use it, where it can be shown
                traceback.print_exc()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # at INFO it speaks of every buffer


def _main(descriptor: int, owner: int) -> None:
    with socket.socket(fileno=descriptor) as control:
        _preload()
        _Server(control, owner).serve()


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
