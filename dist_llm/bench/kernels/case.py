"""One race of a kernel: what is computed, by whom, and what it cannot be faster than."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dist_llm.kernels.impl import Impl

__all__ = ["Errors", "Race", "raced", "relative_errors"]


@dataclass(frozen=True)
class Race:
    """Forward and backward of one function at one shape.

    All contestants take the same arguments as ``reference`` and give the same outputs.

    Attributes:
        title: function, shape and dtype, for people.
        args: positional arguments, on the device of the race.
        wanted: positions of the tensors whose gradients belong to the work; none: the call alone is timed.
        changed: positions of the tensors, or lists of them, that the call writes into: they count as results.
        copies: positions of lists that the call fills with what it changed, rounded. Their error is that of their dtype, thousands of times
            that of the results, and is kept apart from it.
        reference: the definition; in float64 it is the truth.
        ours: what a run would use.
        eager: plain PyTorch, as a careful person writes it; None when there is none. It is also raced under ``torch.compile``.
        why_not_compiled: why it is not; empty: it is.
        peers: further contestants.
        definitions: the reference, and programs made from it, where nobody else computes this function: they bound our error, but they
            are ours as well, and no ratio over them is claimed.
        yardsticks: functions of the same arguments that compute something else and are only timed beside, such as a dense product.
        moved_bytes: memory traffic that forward and backward together cannot avoid; 0: not bound by memory.
        flops: of the matrix products of forward and backward; 0: there are none.
        goal: least speed against the best of ``goal_against``; None: none was set.
        goal_against: names of peers; empty: all.
        notes: what a reader of the figures must know.
    """

    title: str
    args: tuple[Any, ...]
    wanted: tuple[int, ...]
    reference: Callable[..., Any]
    ours: Callable[..., Any]
    eager: Callable[..., Any] | None
    why_not_compiled: str = ""
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    definitions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    yardsticks: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    changed: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()
    moved_bytes: int = 0
    flops: int = 0
    goal: float | None = None
    goal_against: tuple[str, ...] = ()
    notes: str = ""

    def all_peers(self) -> dict[str, Callable[..., Any]]:
        """Every peer by name; nothing is compiled before it is called."""
        made: dict[str, Callable[..., Any]] = {}
        if self.eager is not None:
            made["eager"] = self.eager
            if not self.why_not_compiled:
                made["compile"] = torch.compile(self.eager)
        return {**made, **self.peers}

    def call(self, fn: Callable[..., Any]) -> Callable[[], None]:
        """A function without arguments that does the work once; for timing."""
        args, leaves = _with_leaves(self, self.args)
        arriving: list[torch.Tensor] = []

        def work() -> None:
            outputs = _tensors(fn(*args))
            if leaves:
                roots = [t for t in outputs if t.requires_grad]
                if not arriving:
                    arriving.extend(_arriving(roots))
                torch.autograd.grad(roots, leaves, arriving, allow_unused=True)

        return work

    def results(self, fn: Callable[..., Any], *, exact: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Outputs, changed tensors and gradients of ``fn``, and the copies it made; with ``exact`` from arguments in float64."""

        def copy(value: Any) -> Any:
            if isinstance(value, list):
                return [copy(v) for v in value]
            if not isinstance(value, torch.Tensor):
                return value
            return value.detach().double() if exact and value.is_floating_point() else value.detach().clone()

        args, leaves = _with_leaves(self, tuple(map(copy, self.args)))
        outputs = _tensors(fn(*args))
        values = [t.detach() for t in outputs]
        for where in self.changed:
            values += args[where] if isinstance(args[where], list) else [args[where]]
        copies = [t for where in self.copies for t in args[where]]
        if leaves:
            roots = [t for t in outputs if t.requires_grad]
            values += [g for g in torch.autograd.grad(roots, leaves, _arriving(roots), allow_unused=True) if g is not None]
        return [v.detach() for v in values if v.is_floating_point()], copies


class Errors(NamedTuple):
    """Largest of ||r - r64|| / ||r64||; infinite where it is not a finite number."""

    results: float
    copies: float | None  # None: the race has no copies


def raced(table: tuple[Impl, ...], device: torch.device, dtype: torch.dtype) -> Impl:
    """Whom a race enters: the first implementation that can run, also where none has run before and ``auto`` is still wary of it."""
    return next(impl for impl in table if impl.why_not(device, dtype) is None)


def relative_errors(race: Race, contestants: Mapping[str, Callable[..., Any]]) -> dict[str, Errors]:
    """How far each contestant is from the reference in float64."""
    truth, exact_copies = race.results(race.reference, exact=True)
    answer = {}
    for name, fn in contestants.items():
        values, copies = race.results(fn)
        results_error = _largest(f"{race.title}: {name}", values, truth)
        answer[name] = Errors(results_error, _largest(f"{race.title}: {name}", copies, exact_copies) if race.copies else None)
    return answer


def _largest(who: str, values: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    if len(values) != len(truth):
        raise ValueError(f"{who} has {len(values)} results, the reference {len(truth)}")
    largest = 0.0
    for index, (value, exact) in enumerate(zip(values, truth, strict=True)):
        if value.shape != exact.shape:
            raise ValueError(f"{who} has {tuple(value.shape)} as result {index}, the reference {tuple(exact.shape)}")
        if exact.numel():
            error = float((value.double() - exact).norm() / exact.norm().clamp_min(1e-300))
            # max() would keep or drop a NaN depending on its place.
            largest = max(largest, error if math.isfinite(error) else math.inf)
    return largest


def _with_leaves(race: Race, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    made = list(args)
    for where in race.wanted:
        made[where] = made[where].detach().requires_grad_()
    return tuple(made), [made[where] for where in race.wanted]


def _tensors(answer: Any) -> list[torch.Tensor]:
    values = answer if isinstance(answer, (tuple, list)) else (answer,)
    return [t for t in values if isinstance(t, torch.Tensor)]


def _arriving(roots: list[torch.Tensor]) -> list[torch.Tensor]:
    # The same numbers in every dtype; small whole ones, except for a scalar, whose gradient is 1 in training.
    generator = torch.Generator().manual_seed(5)
    return [
        torch.ones_like(t) if t.dim() == 0 else torch.randint(-3, 4, t.shape, generator=generator).to(device=t.device, dtype=t.dtype)
        for t in roots
    ]
