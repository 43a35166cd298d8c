"""``bench activation``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dist_llm.bench.kernels.case import Race, raced
from dist_llm.kernels.activation import GELU_IMPLS, SWIGLU_IMPLS

__all__ = ["races"]


def eager_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch's own."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def eager_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As models write it: silu's result is rounded before the product."""
    return F.silu(gate) * up


def races(device: torch.device, *, tiny: bool = False) -> list[Race]:
    """bf16, forward and backward, at the hidden layer of a small model (on a GPU of a large one)."""
    rows, dim = (5, 48) if tiny else (3072, 1536) if device.type == "cpu" else (16384, 11008)
    x, up = (torch.randn(rows, dim, device=device).bfloat16() for _ in range(2))
    bias = torch.randn(dim, device=device).bfloat16()
    gelu, swiglu = (raced(table, device, x.dtype).fn for table in (GELU_IMPLS, SWIGLU_IMPLS))
    shape = f"bf16 {rows} x {dim}"
    # Gelu: forward reads x and writes y, backward reads dy and x and writes dx. Swiglu: one tensor more to read each time, one more to write.
    return [
        Race(
            title=f"gelu {shape}",
            args=(x,),
            wanted=(0,),
            reference=GELU_IMPLS[-1].fn,
            ours=gelu,
            eager=eager_gelu,
            moved_bytes=5 * x.nbytes,
        ),
        Race(
            title=f"gelu with bias {shape}",
            args=(x, bias),
            wanted=(0, 1),
            reference=GELU_IMPLS[-1].fn,
            ours=gelu,
            eager=eager_gelu,
            moved_bytes=5 * x.nbytes,
        ),
        Race(
            title=f"swiglu {shape}",
            args=(x, up),
            wanted=(0, 1),
            reference=SWIGLU_IMPLS[-1].fn,
            ours=swiglu,
            eager=eager_swiglu,
            moved_bytes=8 * x.nbytes,
        ),
    ]
