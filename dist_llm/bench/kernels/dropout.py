"""``bench dropout``."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from dist_llm.bench.kernels.case import Race, raced
from dist_llm.kernels.dropout import ADD_IMPLS, IMPLS

__all__ = ["races"]

P = 0.1
NOTES = (
    "nobody else computes this function: beside are its plain definition, which is ours too, and torch's dropout, "
    "which has another mask that depends on the order of calls; no ratio is claimed"
)


def torch_dropout(x: torch.Tensor) -> torch.Tensor:
    """torch's own, with the global generator."""
    return F.dropout(x, P)


def torch_dropout_add(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """torch's own, with the global generator, and the sum."""
    return residual + F.dropout(x, P)


def races(device: torch.device, *, tiny: bool = False) -> list[Race]:
    """bf16, forward and backward, beside the plain definition of the mask."""
    batch, tokens, dim = (2, 5, 48) if tiny else (12, 256, 1536) if device.type == "cpu" else (16, 1024, 4096)
    x, residual = (torch.randn(batch, tokens, dim, device=device).bfloat16() for _ in range(2))
    place = {"seed": 1, "site": 2, "samples": torch.arange(batch, device=device), "columns": torch.arange(tokens, device=device)}
    reference, reference_add = (partial(table[-1].fn, p=P, **place) for table in (IMPLS, ADD_IMPLS))
    shape = f"bf16 {batch} x {tokens} x {dim}, p = {P}"
    return [
        Race(
            title=f"dropout {shape}",
            args=(x,),
            wanted=(0,),
            reference=reference,
            ours=partial(raced(IMPLS, device, x.dtype).fn, p=P, **place),
            eager=None,
            definitions={"our reference": reference, "our reference, compiled": torch.compile(reference)},
            yardsticks={"torch": torch_dropout},
            moved_bytes=4 * x.nbytes,
            notes=NOTES,
        ),
        Race(
            title=f"dropout and residual {shape}",
            args=(x, residual),
            wanted=(0, 1),
            reference=reference_add,
            ours=partial(raced(ADD_IMPLS, device, x.dtype).fn, p=P, **place),
            eager=None,
            definitions={"our reference": reference_add, "our reference, compiled": torch.compile(reference_add)},
            yardsticks={"torch": torch_dropout_add},
            # Forward reads both and writes the sum, whose gradient is the residual's: backward reads it and writes that of x.
            moved_bytes=5 * x.nbytes,
            notes=NOTES,
        ),
    ]
