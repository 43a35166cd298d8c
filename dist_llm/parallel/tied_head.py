"""A tied embedding whose two uses are on different pipeline stages.

The first stage owns it. At the start of a step the last stage gets a working copy; after its last backward it sends the copy's
gradient back, which the first stage adds in its own last backward. So the parameter, its optimiser state and its part of the
gradient norm exist once, and whatever divides or reduces gradients (ZeRO) sees an ordinary one. On the wire this is one copy
of the weight forth and one fp32 gradient back, what an all-reduce between the two stages would send (Shoeybi et al.,
arXiv:1909.08053, and Megatron-LM keep two copies and all-reduce).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from dist_llm.comm.context import Group
from dist_llm.models.decoder import Decoder

__all__ = ["TiedHead"]


class TiedHead:
    """One end of the exchange.

    Args:
        ends: first and last stage.
        first: the model part with the embedding, on the first stage; None on the last.
        last: the model part that borrows it, on the last stage; None on the first.
    """

    def __init__(self, ends: Group, *, first: Decoder | None, last: Decoder | None) -> None:
        assert (first is None) != (last is None), "a rank is one end of the exchange"
        self._ends = ends
        self._first = first
        self._last = last
        self._is_current = False

    def lend(self) -> None:
        """Bring the working copy up to date, unless no step was taken since; both ends call this."""
        if self._is_current:
            return
        if self._first is not None:
            weight = self._first.embedding.weight.detach().contiguous()
            dist.send(weight, group=self._ends.handle, group_dst=1)
        else:
            assert self._last is not None
            shape, dtype, device = self._received()
            weight = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(weight, group=self._ends.handle, group_src=0)
            # fp32, so that the gradients of all micro-batches add up in fp32; the objective casts it where it is used.
            self._last.borrowed_head = weight.float().requires_grad_()
        self._is_current = True

    def send_gradient(self) -> None:
        """Last stage, after its last backward."""
        assert self._last is not None and self._last.borrowed_head is not None
        grad = self._last.borrowed_head.grad
        assert grad is not None, "no backward reached the tied head"
        dist.send(grad.contiguous(), group=self._ends.handle, group_dst=0)
        self._last.borrowed_head.grad = None
        self._is_current = False

    def receive_gradient(self) -> torch.Tensor:
        """First stage, before its last backward: the head's share of the embedding's gradient, fp32."""
        assert self._first is not None
        grad = torch.empty_like(self._first.embedding.weight, dtype=torch.float32)
        dist.recv(grad, group=self._ends.handle, group_src=1)
        self._is_current = False
        return grad

    @property
    def owner(self) -> Decoder | None:
        """The part with the embedding, on the first stage."""
        return self._first

    def _received(self) -> tuple[torch.Size, torch.dtype, torch.device]:
        assert self._last is not None
        model = self._last
        some = next(model.parameters())  # the same precision and device on both ends
        rows = model.own_part("embedding.weight", torch.empty(model.config.vocab_size, 1, device="meta")).shape[0]
        return torch.Size((rows, model.config.d_model)), some.dtype, some.device
