"""``bench layer_norm``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dist_llm.bench.kernels.case import Race, raced
from dist_llm.kernels.layer_norm import IMPLS

__all__ = ["races"]

EPS = 1e-5


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's own."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def races(device: torch.device, *, tiny: bool = False) -> list[Race]:
    """bf16 with bias, forward and backward; the first is the standard shape, the second that of ``bench step``."""
    made = []
    shapes = [(4096, 1024), (3072, 384)] if device.type == "cpu" else [(16384, 4096), (16384, 1024)]
    for rows, dim in [(5, 48)] if tiny else shapes:
        x = torch.randn(rows, dim, device=device).bfloat16()
        weight = (1 + 0.1 * torch.randn(dim, device=device)).bfloat16()
        bias = (0.1 * torch.randn(dim, device=device)).bfloat16()
        made.append(
            Race(
                title=f"LayerNorm bf16 {rows} x {dim}",
                args=(x, weight, bias, EPS),
                wanted=(0, 1, 2),
                reference=IMPLS[-1].fn,
                ours=raced(IMPLS, device, x.dtype).fn,
                eager=eager,
                # Forward reads x and writes y; backward reads dy and x and writes dx.
                moved_bytes=5 * x.nbytes,
                goal=4.0 if (rows, dim) == shapes[0] else None,
            )
        )
    return made
