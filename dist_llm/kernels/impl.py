"""One implementation of an op, and the choice among several.

Each op folder has a literal table of implementations, best first, the last of which always runs. Left to ``auto``, the first that
can run, and has run on that kind of device before, is taken; asked for by name, an implementation runs or the request is refused with the reason. Layers receive the function:
nothing is replaced at import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dist_llm.planning.implementations import NEVER_RUN  # the plan has to know it, without torch
from dist_llm.utils.errors import ConfigError

__all__ = ["NEVER_RUN", "Impl", "WhyNot", "always", "select"]

WhyNot = Callable[[torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Impl:
    """A function that computes an op.

    Attributes:
        op: folder of the op, and its key in the ``kernels`` section of a config.
        name: what a person calls this implementation.
        fn: the function, with the signature of the op's reference.
        why_not: a sentence why it cannot run on a device in a dtype, or None when it can.
    """

    op: str
    name: str
    fn: Callable[..., Any]
    why_not: WhyNot


def always(device: torch.device, dtype: torch.dtype) -> None:
    """The ``why_not`` of an implementation that runs everywhere."""
    del device, dtype


def select(table: tuple[Impl, ...], requested: str, device: torch.device, dtype: torch.dtype) -> Impl:
    """The implementation to use.

    Args:
        table: implementations of one op, best first.
        requested: ``auto`` or the name of one of them.
        device: where the tensors are.
        dtype: of the activations.

    Raises:
        ConfigError: the name is unknown, or that implementation cannot run here.
    """
    reasons = {impl.name: impl.why_not(device, dtype) for impl in table}
    runnable = [impl for impl in table if reasons[impl.name] is None]
    if requested == "auto":
        proven = [impl for impl in runnable if impl.name not in NEVER_RUN.get(device.type, ())]
        if not proven:
            raise ConfigError(f"no implementation of {table[0].op} runs on {device.type} in {dtype}: {reasons}")
        return proven[0]
    where = f"kernels.{table[0].op} = {requested}"
    choices = ", ".join(["auto", *(impl.name for impl in runnable)])
    if requested not in reasons:
        raise ConfigError(f"{where}: there is no such implementation; choose one of {choices}")
    if reasons[requested] is not None:
        raise ConfigError(f"{where} cannot run on {device.type} in {dtype}: {reasons[requested]}; choose one of {choices}")
    return next(impl for impl in runnable if impl.name == requested)
