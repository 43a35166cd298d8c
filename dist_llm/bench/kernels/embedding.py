"""``bench embedding``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dist_llm.bench.kernels.case import Race
from dist_llm.kernels.embedding import BACKWARD_INTO_IMPLS, IMPLS
from dist_llm.kernels.impl import select

__all__ = ["races"]

ROWS, DIM, TOKENS = 50304, 768, 4096


def eager(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """torch's own, with a dense gradient."""
    return F.embedding(ids, weight).to(dtype)


def index_add(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a careful person writes: rows by number, whose gradient is added with ``index_add_``."""
    return weight.index_select(0, ids).to(dtype)


def index_add_into(grad_out: torch.Tensor, ids: torch.Tensor, weight_grad: torch.Tensor) -> None:
    """The same without autograd, into a gradient that is there."""
    weight_grad.index_add_(0, ids, grad_out.to(weight_grad.dtype))


def races(device: torch.device) -> list[Race]:
    """Forward and backward, bf16 rows of a bf16 table and of an fp32 one; then backward alone into a gradient that is there."""
    made = []
    tokens = TOKENS if device.type == "cpu" else 4 * TOKENS
    ids = torch.randint(0, ROWS, (tokens,), device=device)
    for table_dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(ROWS, DIM, device=device).to(table_dtype)
        name = str(table_dtype).removeprefix("torch.")
        made.append(
            Race(
                title=f"embedding {tokens} of {ROWS} x {DIM} {name}, dense gradient",
                args=(ids, weight, torch.bfloat16),
                wanted=(1,),
                reference=IMPLS[-1].fn,
                ours=select(IMPLS, "auto", device, torch.bfloat16).fn,
                eager=eager,
                peers={"index_add": index_add},
                # Forward reads rows and writes them in bf16; backward reads these gradients and writes the whole gradient.
                moved_bytes=tokens * DIM * (weight.element_size() + 2 * 2) + weight.nbytes,
                goal=None,
                notes="the zeros of the gradient are most of the work",
            )
        )
    grad_out = torch.randn(tokens, DIM, device=device).bfloat16()
    made.append(
        Race(
            title=f"embedding backward of {tokens} into {ROWS} x {DIM} float32",
            args=(grad_out, ids, torch.zeros(ROWS, DIM, device=device)),
            wanted=(),
            changed=(2,),
            reference=BACKWARD_INTO_IMPLS[-1].fn,
            ours=select(BACKWARD_INTO_IMPLS, "auto", device, torch.bfloat16).fn,
            eager=index_add_into,
            # The rows that are used are read and written.
            moved_bytes=tokens * DIM * (2 + 4 + 4),
        )
    )
    return made
