"""What an exception on one rank says about the run: a cause, or the echo of a failure elsewhere."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from dist_llm.cluster.health import Beat, Failure
from dist_llm.config.schema import RunConfig
from dist_llm.engine.watch import Watch
from dist_llm.utils.errors import ExitCode, OutOfMemory, UserError

__all__ = ["RankFailed", "ending_of", "failure_of", "hang", "is_echo", "is_timeout", "out_of_memory"]

# What gloo and NCCL say when the other end is gone; both raise plain RuntimeErrors for some of it.
_BROKEN = ("gloo", "connection closed", "connection reset", "connection refused", "broken pipe", "nccl error", "process group")
_TIMED_OUT = ("timed out", "timeout")
MAX_TRACEBACK = 20_000  # characters; the end is what counts


class RankFailed(UserError):
    """A rank raised what nobody foresaw, died or stopped; the exit code is the failure's."""

    def __init__(self, message: str, *, code: int, is_echo: bool = False) -> None:
        super().__init__(message)
        self.exit_code = ExitCode(code)
        self.is_echo = is_echo


def ending_of(caught: BaseException, config: RunConfig, watch: Watch, *, rank: int, world_size: int, step: int | None) -> BaseException:
    """What this rank shall raise in place of ``caught``: its own error when that is the first cause, else the first cause's echo.

    The rank that failed prints its own error; the lowest surviving rank of each machine repeats the first cause as the last line.
    It is in exit.json when this returns.
    """
    error = out_of_memory(caught, config) or caught
    told_to_a_person = isinstance(error, UserError)
    if is_timeout(caught):
        verdict = watch.first_cause(
            lambda: hang(caught, watch.beats(), rank=rank, step=step, still_s=watch.seconds_since_step()), is_echo=False, is_agreed=False
        )
    else:
        own = failure_of(error, rank=rank, step=step, alone=world_size == 1)
        verdict = watch.first_cause(own, is_echo=is_echo(error), is_agreed=told_to_a_person)
    if watch.repeats(verdict):
        return RankFailed(f"{verdict.reason}; all ranks stop", code=verdict.code)
    if verdict.teller != rank:
        return RankFailed(verdict.reason, code=verdict.code, is_echo=True)
    if told_to_a_person or world_size == 1:
        return error
    traceback.print_exception(caught)
    return RankFailed(verdict.reason, code=verdict.code)


def is_echo(error: BaseException) -> bool:
    """Whether ``error`` may be the consequence of what happened on another rank: an agreed refusal, or a broken collective."""
    if isinstance(error, UserError):
        return error.is_echo
    return any(_is_broken_collective(e) for e in _chain(error))


def is_timeout(error: BaseException) -> bool:
    """Whether ``error`` is a collective that waited to the end of its patience."""
    return any(_is_broken_collective(e) and _says(e, _TIMED_OUT) for e in _chain(error))


def failure_of(error: BaseException, *, rank: int, step: int | None, alone: bool = False) -> Failure:
    """``error`` as the failure that ``rank`` tells; ``alone``: there is no other rank to tell it from."""
    host = socket.gethostname()
    who, first = f"rank {rank} on {host} (pid {os.getpid()})", (str(error).splitlines() or [""])[0]
    code = ExitCode.CHECK_FAILED
    if isinstance(error, UserError):
        code = error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        code = ExitCode.INTERRUPTED
    if alone:
        reason = f"{type(error).__name__}: {error}"
    elif is_echo(error) and not isinstance(error, UserError):
        reason = (
            f"{who} lost another rank at step {_number(step)} and nobody said why; "
            f"a node or the network between nodes may have failed ({first})"
        )
    else:
        reason = f"{who} failed at step {_number(step)}: {type(error).__name__}: {first}"
    text = "".join(traceback.format_exception(error))[-MAX_TRACEBACK:]
    return Failure(code=int(code), reason=reason, rank=rank, host=host, step=step, traceback=text, teller=rank)


def hang(error: BaseException, beats: Mapping[int, Beat], *, rank: int, step: int | None, still_s: float) -> Failure:
    """A collective that ran into its timeout as a failure: which rank does not wait with the others, and who got how far."""
    idle = [beat for beat in beats.values() if not beat.waits and beat.rank != rank]
    reason = f"hang: no step for {still_s:.0f} s after step {_number(step)}; rank {rank} waited in a collective to its timeout"
    for beat in idle[:4]:
        reason += f"; rank {beat.rank} on {beat.host} (pid {beat.pid}) is not in one but in {beat.where}"
    if len(idle) > 4:
        reason += f"; so are {len(idle) - 4} more ranks"
    if not idle:
        reason += "; all ranks wait, each for another"
    reached: dict[int, list[int]] = {}
    for beat in beats.values():
        reached.setdefault(beat.step, []).append(beat.rank)
    reason += "; steps done: " + ", ".join(f"{s} by rank {_ranges(r)}" for s, r in sorted(reached.items()))
    culprit = idle[0] if len(idle) == 1 else None
    return Failure(
        code=int(ExitCode.HANG),
        reason=reason,
        rank=culprit.rank if culprit else None,
        host=culprit.host if culprit else socket.gethostname(),
        step=step,
        traceback="".join(traceback.format_exception(error))[-MAX_TRACEBACK:],
    )


def out_of_memory(error: BaseException, config: RunConfig) -> OutOfMemory | None:
    """``error`` as an OutOfMemory that names the keys which help; None when it is something else."""
    # torch's CPU allocator has no exception of its own.
    on_cpu = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    if not on_cpu and not isinstance(error, torch.OutOfMemoryError | MemoryError):
        return None
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    micro, recompute = config.train.micro_batch_size, config.parallel.recompute
    return OutOfMemory(
        f"out of memory on {socket.gethostname()} ({first}); lower train.micro_batch_size ({micro}), set parallel.recompute=full "
        f"({recompute}), raise parallel.zero ({config.parallel.zero}) on more ranks, or take a smaller model; --dry-run shows what each needs"
    )


def _is_broken_collective(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _says(error, _BROKEN))


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(phrase in text for phrase in phrases)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _number(step: int | None) -> str:
    return "?" if step is None else str(step)


def _ranges(ranks: list[int]) -> str:
    """1-3, 5 for [1, 2, 3, 5]."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
