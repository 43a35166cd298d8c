"""``bench linear_cross_entropy``: the output layer and the loss, with at most a sixteenth of the logits in memory."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from dist_llm.bench.kernels.case import Race, raced
from dist_llm.bench.kernels.cross_entropy import IGNORE
from dist_llm.bench.kernels.cross_entropy import eager as cross_entropy_eager
from dist_llm.kernels.cross_entropy import IMPLS, LINEAR_IMPLS
from dist_llm.kernels.cross_entropy.reference import CrossEntropyFn

__all__ = ["races"]


def eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A product, and torch's cross-entropy in fp32: all logits, and more than once."""
    return cross_entropy_eager(F.linear(hidden, weight), targets)


def whole(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, head: CrossEntropyFn) -> torch.Tensor:
    """A product, and our cross-entropy: all logits, once."""
    return head(F.linear(hidden, weight), targets, ignore=IGNORE)


def products(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The three products alone, all rows at once, with the logits standing for their own gradient."""
    del targets
    logits = hidden.detach() @ weight.detach().t()
    torch.mm(logits, weight.detach())
    torch.mm(logits.t(), hidden.detach())
    return (hidden[0, 0] + weight[0, 0]).float()


def races(device: torch.device, *, tiny: bool = False) -> list[Race]:
    """bf16, forward and backward; the first is the standard shape."""
    made = []
    shapes = [(4096, 256, 50304), (2048, 768, 32000)] if device.type == "cpu" else [(8192, 2048, 50304), (8192, 4096, 128256)]
    for rows, dim, vocab in [(32, 16, 65)] if tiny else shapes:
        hidden = torch.randn(rows, dim, device=device).bfloat16()
        weight = (dim**-0.5 * torch.randn(vocab, dim, device=device)).bfloat16()
        made.append(
            Race(
                title=f"linear and cross-entropy bf16 {rows} x {dim}, {vocab}",
                args=(hidden, weight, torch.randint(0, vocab, (rows,), device=device)),
                wanted=(0, 1),
                reference=partial(LINEAR_IMPLS[-1].fn, ignore=IGNORE),
                ours=partial(raced(LINEAR_IMPLS, device, torch.bfloat16).fn, ignore=IGNORE),
                eager=eager,
                yardsticks={
                    "all logits, our loss": partial(whole, head=raced(IMPLS, device, torch.bfloat16).fn),
                    "products alone": products,
                },
                flops=6 * rows * dim * vocab,
                goal=1.3 if device.type == "cpu" and (rows, dim, vocab) == shapes[0] else None,
            )
        )
    return made
