"""What the ranks of one attempt tell each other about their health through the run directory.

    RUN/health/attempt-N/ranks/rank-R.json   who rank R is and how far it got; removed by the rank when it leaves in order
    RUN/health/attempt-N/failure.json        the first failure of the attempt; whoever comes second finds it there

A rank that is gone while its file stands has died. The first failure is decided by the file system (``link`` makes a name or
refuses), not by clocks, which differ between machines. The two live in different directories so that the one every rank looks
into twice a second has two entries, however many ranks there are.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from dist_llm.utils.errors import StorageError

__all__ = ["Beat", "Failure", "HealthDir"]

T = TypeVar("T")


@dataclass(frozen=True)
class Beat:
    """A rank, and where it was when it last said so."""

    rank: int
    host: str
    pid: int
    step: int  # optimiser steps done
    where: str  # the function its main thread is in
    waits: bool  # whether that is inside a collective


@dataclass(frozen=True)
class Failure:
    """Why an attempt ends: the first cause, the same for all ranks."""

    code: int  # exit code of every rank
    reason: str
    rank: int | None  # None when no single rank is to blame
    host: str
    step: int | None  # optimiser steps done
    traceback: str | None = None
    teller: int | None = None  # the rank that says it itself; None: it cannot speak, only the survivors can


class HealthDir:
    """``health/attempt-N`` of a run."""

    def __init__(self, run_dir: Path, attempt: int) -> None:
        self.path = run_dir / "health" / f"attempt-{attempt}"
        self._ranks = self.path / "ranks"
        self._failure = self.path / "failure.json"

    def prepare(self) -> None:
        """Make it, empty; the main rank does so before any other comes.

        What earlier attempts left of their ranks goes; their failures stay.

        Raises:
            StorageError: the disk refuses.
        """
        try:
            shutil.rmtree(self.path, ignore_errors=True)
            for old in self.path.parent.glob("attempt-*/ranks"):
                shutil.rmtree(old, ignore_errors=True)
            self._ranks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {self._ranks}: {error.strerror}; check its owner, permissions and space") from error
        if self._failure.exists():
            raise StorageError(f"{self._failure} is of an earlier start and cannot be removed; remove it, or every rank stops at once")

    def beat(self, beat: Beat) -> None:
        """Write who and where this rank is; whole or not at all, but not durable: it is only read while ranks run.

        Raises:
            StorageError: the disk refuses.
        """
        self._put(self._rank_file(beat.rank), asdict(beat), exclusive=False)

    def beats(self) -> dict[int, Beat]:
        """What the ranks that have not left last said."""
        found = (_read(path, Beat) for path in sorted(self._ranks.glob("rank-*.json")))
        return {beat.rank: beat for beat in found if beat is not None}

    def leave(self, rank: int) -> None:
        """Say that ``rank`` ends knowingly. Removing a file works on a full disk too."""
        with contextlib.suppress(OSError):  # the directory is gone or unreachable: there is nobody to tell
            self._rank_file(rank).unlink(missing_ok=True)

    def has_left(self, rank: int) -> bool:
        """Whether ``rank`` has said so."""
        try:
            return not self._rank_file(rank).exists()
        except OSError:  # an unreachable file server: nobody can have said anything
            return False

    def claim(self, failure: Failure) -> Failure:
        """Make ``failure`` the first one unless there is one; returns the first one.

        Raises:
            StorageError: the disk refuses.
        """
        try:
            self._put(self._failure, asdict(failure), exclusive=True)
        except FileExistsError:
            return self.first_failure() or failure
        return failure

    def first_failure(self) -> Failure | None:
        """The first failure, if there is one yet."""
        # Listing a directory makes NFS ask its server; asking for one name would be answered from what it remembers.
        try:
            if self._failure not in set(self.path.iterdir()):
                return None
        except OSError:  # an unreachable file server: no news
            return None
        return _read(self._failure, Failure)

    def _rank_file(self, rank: int) -> Path:
        return self._ranks / f"rank-{rank}.json"

    def _put(self, path: Path, value: dict[str, Any], *, exclusive: bool) -> None:
        temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            if exclusive:
                os.link(temporary, path)
            else:
                os.replace(temporary, path)
        except FileExistsError:
            raise
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}; check its owner, permissions and space") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _read(path: Path, kind: type[T]) -> T | None:
    # A file that goes away while it is read is one of a rank that leaves.
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return kind(**{field.name: value[field.name] for field in fields(kind)})  # type: ignore[arg-type]  # our two dataclasses
    except (OSError, ValueError, KeyError, TypeError):
        return None
