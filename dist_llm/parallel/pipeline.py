"""One pipeline stage at work: its forwards and backwards in the order of a schedule, activations and gradients point to point.

Which action comes when is integers (topology/schedule.py). Here an action waits for what it needs from its neighbour, computes,
and sends on without waiting. Activations travel in one process group and gradients in another, so neither stands behind the
other. Every stage has the micro-batch itself, rows and positions derived from sample numbers, so only hidden states travel, and
their shape is known without asking. Any number of micro-batches, of any sizes, will do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.comm.context import Group, ParallelContext
from dist_llm.topology.schedule import Action, orders

__all__ = ["Pipeline", "Span", "inject"]

Forward = Callable[[int, int, torch.Tensor | None], torch.Tensor]
Backward = Callable[[int, int, torch.Tensor, torch.Tensor | None, bool], None]


@dataclass(frozen=True)
class Span:
    """When an action ran on this stage, seconds of ``time.perf_counter``; waiting for its input is not part of it."""

    action: Action
    start: float
    end: float


class Pipeline:
    """This rank's stages of a pipeline.

    Args:
        ctx: where this rank stands.
        schedule: name known to ``topology.schedule.orders``.
        chunks: stages a rank holds; stage number ``chunk * pp + rank`` of the whole.
        dtype: of hidden states.
    """

    def __init__(self, ctx: ParallelContext, *, schedule: str, chunks: int, dtype: torch.dtype) -> None:
        self._ctx = ctx
        self._schedule = schedule
        self._chunks = chunks
        self._dtype = dtype
        self._sent: list[tuple[Any, torch.Tensor]] = []
        self.spans: list[Span] = []

    def is_first(self, chunk: int) -> bool:
        """Whether tokens enter at this rank's stage ``chunk``."""
        return self._ctx.pp.rank == 0 and chunk == 0

    def is_last(self, chunk: int) -> bool:
        """Whether the loss is computed at this rank's stage ``chunk``."""
        return self._ctx.pp.rank == self._ctx.pp.size - 1 and chunk == self._chunks - 1

    def run(self, shapes: Sequence[torch.Size], forward: Forward, backward: Backward) -> None:
        """All forwards and backwards of one step.

        Args:
            shapes: of the hidden states of each micro-batch.
            forward: (micro, chunk, hidden or None) -> hidden states, or the loss on the last stage.
            backward: (micro, chunk, what forward gave, its gradient or None for the loss, whether it is this rank's last backward).
        """
        self.spans = []
        order = orders(self._schedule, self._ctx.pp.size, len(shapes), self._chunks)[self._ctx.pp.rank]
        inputs: dict[tuple[int, int], torch.Tensor | None] = {}
        outputs: dict[tuple[int, int], torch.Tensor] = {}
        arriving = self._receive(order[0], shapes)
        for i, action in enumerate(order):
            received = _wait(arriving)
            # The next one's input may travel while this one computes.
            arriving = self._receive(order[i + 1], shapes) if i + 1 < len(order) else None
            key = (action.micro, action.chunk)
            start = time.perf_counter()
            if action.kind == "F":
                inputs[key] = received.requires_grad_() if received is not None else None
                outputs[key] = forward(action.micro, action.chunk, received)
                end = time.perf_counter()
                if not self.is_last(action.chunk):
                    self._send(outputs[key].detach(), self._ctx.pp, +1, action)
            else:
                backward(action.micro, action.chunk, outputs.pop(key), received, i + 1 == len(order))
                end = time.perf_counter()
                hidden = inputs.pop(key)
                if hidden is not None:
                    assert hidden.grad is not None, f"{action}: backward left no gradient for the stage before"
                    self._send(hidden.grad, self._ctx.pp_back, -1, action)
            self.spans.append(Span(action, start, end))
        self._finish_sends()

    @torch.no_grad()
    def forward_only(self, shape: torch.Size, forward: Forward) -> torch.Tensor | None:
        """One micro-batch through all stages; what the last stage computed, None elsewhere."""
        result = None
        for chunk in range(self._chunks):
            action = Action("F", 0, chunk)
            out = forward(0, chunk, _wait(self._receive(action, [shape])))
            if self.is_last(chunk):
                result = out
            else:
                self._send(out, self._ctx.pp, +1, action)
        self._finish_sends()
        return result

    def _receive(self, action: Action, shapes: Sequence[torch.Size]) -> tuple[Any, torch.Tensor] | None:
        if action.kind == "F":
            if self.is_first(action.chunk):
                return None
            group, step = self._ctx.pp, -1
        else:
            if self.is_last(action.chunk):
                return None
            group, step = self._ctx.pp_back, +1
        buffer = torch.empty(shapes[action.micro], dtype=self._dtype, device=self._ctx.device)
        work = dist.irecv(buffer, group=group.handle, group_src=_neighbour(group, step), tag=self._tag(action, step))
        return work, buffer

    def _send(self, tensor: torch.Tensor, group: Group, step: int, action: Action) -> None:
        tensor = tensor.contiguous()
        tag = self._tag(action, 0)
        self._sent.append((dist.isend(tensor, group=group.handle, group_dst=_neighbour(group, step), tag=tag), tensor))
        # Buffers live until they have left.
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]

    def _finish_sends(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent = []

    def _tag(self, action: Action, step: int) -> int:
        """Names a message by its sender: micro-batch, and chunk on the sending rank."""
        chunk, rank, last = action.chunk, self._ctx.pp.rank, self._ctx.pp.size - 1
        if step == -1 and rank == 0:  # what enters a chunk of the first rank left the chunk before it on the last
            chunk -= 1
        if step == +1 and rank == last:
            chunk += 1
        return action.micro * self._chunks + chunk


def _neighbour(group: Group, step: int) -> int:
    return (group.rank + step) % group.size


def _wait(arriving: tuple[Any, torch.Tensor] | None) -> torch.Tensor | None:
    if arriving is None:
        return None
    work, tensor = arriving
    work.wait()
    return tensor


def inject(output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A scalar, zero, whose backward gives ``output`` the gradient ``gradient``: for engines that take only losses."""
    return _Inject.apply(output, gradient)  # type: ignore[no-untyped-call]


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return torch.zeros((), dtype=torch.float32, device=output.device)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None
