"""``bench embedding``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dist_llm.bench.kernels.case import Race, raced
from dist_llm.kernels.embedding import BACKWARD_INTO_IMPLS, IMPLS

__all__ = ["races"]


def eager(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """torch's own, with a dense gradient."""
    return F.embedding(ids, weight).to(dtype)


def index_add(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a careful person writes: rows by number, whose gradient is added with ``index_add_``."""
    return weight.index_select(0, ids).to(dtype)


def dense_into(grad_out: torch.Tensor, ids: torch.Tensor, weight_grad: torch.Tensor) -> None:
    """What autograd does where a gradient is there: a whole gradient, added to it."""
    weight_grad += torch.ops.aten.embedding_dense_backward(grad_out.to(weight_grad.dtype), ids, weight_grad.shape[0], -1, False)


def index_add_into(grad_out: torch.Tensor, ids: torch.Tensor, weight_grad: torch.Tensor) -> None:
    """The same without a whole gradient, which autograd cannot do."""
    weight_grad.index_add_(0, ids, grad_out.to(weight_grad.dtype))


def races(device: torch.device, *, tiny: bool = False) -> list[Race]:
    """Backward into a gradient that is there, by autograd's way and by ``index_add_``; then forward and a whole gradient."""
    rows, dim, tokens = (97, 16, 24) if tiny else (50304, 768, 4096 if device.type == "cpu" else 16384)
    ids = torch.randint(0, rows, (tokens,), device=device)
    grad_out = torch.randn(tokens, dim, device=device).bfloat16()
    used = int(ids.bincount().count_nonzero())
    into = raced(BACKWARD_INTO_IMPLS, device, torch.bfloat16).fn
    made, whole = [], []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(rows, dim, device=device).to(dtype)
        table = f"{rows} x {dim} {str(dtype).removeprefix('torch.')}"
        made.append(
            Race(
                title=f"embedding backward of {tokens} tokens into {table}",
                args=(grad_out, ids, torch.zeros_like(weight)),
                wanted=(),
                changed=(2,),
                reference=BACKWARD_INTO_IMPLS[-1].fn,
                ours=into,
                eager=dense_into,
                peers={"index_add": index_add_into, "compile, index_add": torch.compile(index_add_into)},
                # The rows that are used are read and written.
                moved_bytes=grad_out.nbytes + 2 * used * dim * weight.element_size(),
                goal=10.0,
                goal_against=("eager", "compile"),
                notes="eager and compile are what autograd does, a whole gradient that is added; index_add is what a person can write by hand, "
                "and the goal is not about it",
            )
        )
        whole.append(
            Race(
                title=f"embedding of {tokens} tokens, {table}, forward and a whole gradient",
                args=(ids, weight, torch.bfloat16),
                wanted=(1,),
                reference=IMPLS[-1].fn,
                ours=raced(IMPLS, device, torch.bfloat16).fn,
                eager=eager,
                peers={"index_add": index_add},
                # Forward reads rows and writes them in bf16; backward reads their gradients and writes the whole gradient.
                moved_bytes=used * dim * weight.element_size() + 2 * grad_out.nbytes + weight.nbytes,
                notes="the zeros of the whole gradient are most of the work",
            )
        )
    return [*made, *whole]
