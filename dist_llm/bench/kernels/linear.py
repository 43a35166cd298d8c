"""``bench linear``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dist_llm.bench.kernels.case import Race, raced
from dist_llm.kernels.linear import IMPLS, WEIGHT_GRAD_IMPLS

__all__ = ["races"]


def races(device: torch.device, *, tiny: bool = False) -> list[Race]:
    """bf16: a layer with bias, forward and backward, in the shapes of a block 384 wide; then the gradient of its weight alone."""
    widths = [(33, 40)] if tiny else [(384, 1152), (384, 1536), (1536, 384)] if device.type == "cpu" else [(4096, 4096), (4096, 14336)]
    tokens = 65 if tiny else 12 * 256 if device.type == "cpu" else 8192
    made = []
    for inputs, outputs in widths:
        x, dy = (torch.randn(tokens, width, device=device).bfloat16() for width in (inputs, outputs))
        weight = (torch.randn(outputs, inputs, device=device) / inputs**0.5).bfloat16()
        bias = torch.randn(outputs, device=device).bfloat16()
        shape = f"bf16 {tokens} x {inputs} -> {outputs}"
        product = 2 * tokens * inputs * outputs
        made += [
            Race(
                title=f"linear {shape}",
                args=(x, weight, bias),
                wanted=(0, 1, 2),
                reference=IMPLS[-1].fn,
                ours=raced(IMPLS, device, torch.bfloat16).fn,
                eager=F.linear,
                flops=3 * product,
            ),
            Race(
                title=f"gradient of its weight and bias {shape}",
                args=(dy, x),
                wanted=(),
                reference=WEIGHT_GRAD_IMPLS[-1].fn,
                ours=raced(WEIGHT_GRAD_IMPLS, device, torch.bfloat16).fn,
                eager=WEIGHT_GRAD_IMPLS[-1].fn,  # what autograd does for a linear layer
                flops=product,
            ),
        ]
    return made
