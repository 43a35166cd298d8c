"""Softmax cross-entropy over a vocabulary divided over tensor-parallel ranks.

Each rank knows of every row its largest logit, its sum of exponentials and, if it holds it, the target's logit; two
all-reduces of one and two numbers a row make them those of the whole vocabulary (Shoeybi et al., arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.comm.context import Group

__all__ = ["VocabParallelCrossEntropy"]


@dataclass(frozen=True)
class VocabParallelCrossEntropy:
    """A ``CrossEntropyFn`` whose logits are this rank's columns.

    Attributes:
        tp: ranks that hold the other columns.
        vocab_start: number of this rank's first column.
        partials: an implementation of ``cross_entropy_partials``.
        backward: an implementation of ``cross_entropy_backward``.
    """

    tp: Group
    vocab_start: int
    partials: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    backward: Callable[..., torch.Tensor]

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor, *, ignore: int, z_loss: float = 0.0) -> torch.Tensor:
        """Sum over the valid rows, the same on every rank.

        Args:
            logits: (N, columns of this rank), fp32 or bf16.
            targets: (N,) int64 in the whole vocabulary, or ``ignore``.
            ignore: marks a row that does not count.
            z_loss: weight of the square of lse.

        Returns:
            scalar fp32.
        """
        return _CrossEntropy.apply(logits, targets, ignore, z_loss, self)  # type: ignore[no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, ignore: int, z_loss: float, over: VocabParallelCrossEntropy
    ) -> torch.Tensor:
        own_max, own_sum, target_logit = over.partials(logits, targets, ignore=ignore, vocab_start=over.vocab_start)
        row_max = own_max.clone()
        dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=over.tp.handle)
        # A rank whose columns are all -inf contributes 0 * exp(-inf).
        summed = torch.stack((own_sum * (own_max - row_max).exp(), target_logit))
        dist.all_reduce(summed, group=over.tp.handle)
        row_sum, target_logit = summed.unbind()
        ctx.save_for_backward(logits, targets, row_max, row_sum)
        ctx.options = (ignore, z_loss, over)
        lse = row_max + row_sum.log()
        return torch.where(targets == ignore, 0.0, lse - target_logit + z_loss * lse.square()).sum()

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        logits, targets, row_max, row_sum = ctx.saved_tensors
        ignore, z_loss, over = ctx.options
        grad = over.backward(dloss, logits, targets, row_max, row_sum, ignore=ignore, z_loss=z_loss, vocab_start=over.vocab_start)
        return grad, None, None, None, None
