"""Cross-entropy in plain PyTorch: the definition, and the pieces that a vocabulary divided over ranks is computed from.

N rows, V vocabulary, D model dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

__all__ = [
    "CrossEntropyFn",
    "cross_entropy_backward_reference",
    "cross_entropy_partials_reference",
    "cross_entropy_reference",
    "linear_cross_entropy_reference",
]


class CrossEntropyFn(Protocol):
    """An implementation of cross-entropy, with the arguments of ``cross_entropy_reference``."""

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor, *, ignore: int, z_loss: float = ...) -> torch.Tensor:
        """The summed loss."""
        ...


def cross_entropy_reference(logits: torch.Tensor, targets: torch.Tensor, *, ignore: int, z_loss: float = 0.0) -> torch.Tensor:
    """Sum over the rows with a target of ``lse - logits[target] + z_loss * lse^2``, lse the log of the sum of exp(logits).

    Args:
        logits: (..., V), fp32 or bf16; computed in fp32. fp64 is computed in fp64: tests measure errors against it.
        targets: (...) int64, each ``ignore`` or in [0, V).
        ignore: marks a row that does not count.
        z_loss: weight of the square of lse, which keeps the logits from drifting (PaLM, arXiv:2204.02311, section 5).

    Returns:
        scalar, fp32 (fp64 for fp64).
    """
    wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    rows = targets.flatten()
    loss = F.cross_entropy(wide, rows, ignore_index=ignore, reduction="sum")
    if z_loss == 0.0:
        return loss
    lse = torch.logsumexp(wide, -1)
    return loss + z_loss * torch.where(rows == ignore, 0.0, lse).square().sum()


def _columns(logits: torch.Tensor, targets: torch.Tensor, ignore: int, vocab_start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target among the columns at hand, and whether it is one of them."""
    column = targets - vocab_start
    is_here = (targets != ignore) & (column >= 0) & (column < logits.shape[-1])
    return torch.where(is_here, column, 0), is_here


def cross_entropy_partials_reference(
    logits: torch.Tensor, targets: torch.Tensor, *, ignore: int, vocab_start: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a rank that holds some columns of the logits knows of each row. Not differentiable.

    Over ranks: ``row_max`` is reduced by maximum, ``row_sum * exp(row_max - reduced row_max)`` by addition, ``target_logit``
    by addition; then lse = row_max + log(row_sum).

    Args:
        logits: (N, V), fp32 or bf16: columns ``vocab_start`` to ``vocab_start + V`` of the whole.
        targets: (N,) int64 in the whole vocabulary, or ``ignore``.
        ignore: marks a row that does not count: its results are 0, 1 and 0.
        vocab_start: first column at hand.

    Returns:
        row_max, row_sum (of exp(logits - row_max)) and target_logit (0 where the target is another rank's), each (N,) fp32.
    """
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    counts = targets != ignore
    row_max = wide.amax(-1)
    # A row of -inf has the sum 0, not a NaN: other ranks may have finite columns.
    shift = torch.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = (wide - shift[:, None]).exp().sum(-1)
    column, is_here = _columns(logits, targets, ignore, vocab_start)
    target_logit = torch.where(is_here, wide.gather(1, column[:, None])[:, 0], 0.0)
    return torch.where(counts, row_max, 0.0), torch.where(counts, row_sum, 1.0), target_logit


def cross_entropy_backward_reference(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    *,
    ignore: int,
    z_loss: float = 0.0,
    vocab_start: int = 0,
) -> torch.Tensor:
    """Gradient of the loss with respect to the columns at hand, from the maximum and sum of whole rows.

    Args:
        dloss: scalar fp32, gradient of the summed loss.
        logits: (N, V), as given to ``cross_entropy_partials_reference``.
        targets: (N,) int64 in the whole vocabulary, or ``ignore``.
        row_max: (N,) fp32, over all columns.
        row_sum: (N,) fp32, over all columns.
        ignore: marks a row that does not count: its gradient is 0.
        z_loss: weight of lse^2 in the loss.
        vocab_start: first column at hand.

    Returns:
        (N, V), dtype of logits.
    """
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    column, is_here = _columns(logits, targets, ignore, vocab_start)
    factor = dloss * (1 + 2 * z_loss * (row_max + row_sum.log())) / row_sum
    grad = (wide - row_max[:, None]).exp() * factor[:, None]
    grad.scatter_add_(1, column[:, None], torch.where(is_here, -dloss, 0.0).to(grad.dtype)[:, None])
    return torch.where((targets == ignore)[:, None], 0.0, grad).to(logits.dtype)


def linear_cross_entropy_reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, ignore: int, z_loss: float = 0.0
) -> torch.Tensor:
    """``cross_entropy_reference`` of ``hidden @ weight.T``, all logits at once, in the dtype of ``hidden``.

    Args:
        hidden: (..., D), fp32 or bf16.
        weight: (V, D), dtype of hidden or fp32.
        targets: (...) int64, each ``ignore`` or in [0, V).
        ignore: marks a row that does not count.
        z_loss: weight of the square of lse.

    Returns:
        scalar, fp32 (fp64 for fp64).
    """
    logits = F.linear(hidden.flatten(0, -2), weight.to(hidden.dtype))
    return cross_entropy_reference(logits, targets.flatten(), ignore=ignore, z_loss=z_loss)
