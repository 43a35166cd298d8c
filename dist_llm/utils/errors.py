"""What can go wrong, and the exit code each kind of failure has.

The codes are a promise to scripts and schedulers: documented in docs/exit-codes.md, never renumbered.
An error a person can act on is a ``UserError``: its text names the thing, the value, the rule and the way out,
and the command line prints it without a traceback.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "ConfigError",
    "DataError",
    "ExitCode",
    "LaunchError",
    "NoCheckpointError",
    "NumericalError",
    "OutOfMemory",
    "RunOwnedError",
    "StorageError",
    "UserError",
]


class ExitCode(IntEnum):
    """Exit status of every ``dist-llm`` command."""

    DONE = 0
    CHECK_FAILED = 1  # a check the command makes does not hold, or a rank raised
    USAGE = 2  # command line or config
    DATA = 65  # corpus, shard or tokenizer bad
    NO_CHECKPOINT = 66  # no valid checkpoint though one was demanded
    INTERNAL = 70  # internal error or rendezvous
    OUT_OF_MEMORY = 71
    HANG = 72
    RUN_OWNED = 73  # run directory owned by another job
    IO = 74  # disk full or unreadable
    REQUEUE = 75  # saved; start me again (time limit, pre-emption)
    NUMERICAL = 76  # loss or gradient not finite
    NODE_SUSPECT = 77
    NO_PROGRESS = 78
    INTERRUPTED = 130  # Ctrl-C, after saving


class UserError(ValueError):
    """A failure with one clear message and a documented exit code."""

    exit_code = ExitCode.USAGE
    is_echo = False  # True on a rank where another rank says the same: it ends with the same code, silently


class ConfigError(UserError):
    """The command line or a config file cannot be used as it is."""


class DataError(UserError):
    """A corpus, a shard or a tokenizer is missing, damaged or does not match."""

    exit_code = ExitCode.DATA


class NoCheckpointError(UserError):
    """A checkpoint was demanded and no valid one exists."""

    exit_code = ExitCode.NO_CHECKPOINT


class LaunchError(UserError):
    """Ranks could not find each other, or disagree about what they run."""

    exit_code = ExitCode.INTERNAL


class RunOwnedError(UserError):
    """Another process writes into this run directory."""

    exit_code = ExitCode.RUN_OWNED


class StorageError(UserError):
    """The disk is full, read-only or otherwise refuses."""

    exit_code = ExitCode.IO


class NumericalError(UserError):
    """A loss or a gradient stopped being a finite number."""

    exit_code = ExitCode.NUMERICAL


class OutOfMemory(UserError):
    """Memory of the device or the host ran out."""

    exit_code = ExitCode.OUT_OF_MEMORY
