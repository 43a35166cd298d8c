"""``bench moe_mlp``: the MLPs of many experts over ragged groups of rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dist_llm.bench.kernels.case import Race, raced
from dist_llm.kernels.moe import MLP_IMPLS

__all__ = ["races"]

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def eager(rows: torch.Tensor, counts: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """One expert after the other; unbound once, as the gradient of gate[e] would be as large as gate for each e."""
    groups = torch.split(rows, counts.tolist())
    outputs = []
    for group, gate_e, up_e, down_e in zip(groups, gate.unbind(), up.unbind(), down.unbind(), strict=True):
        outputs.append(F.linear(F.silu(F.linear(group, gate_e)) * F.linear(group, up_e), down_e))
    return torch.cat(outputs)


class DenseProducts(torch.autograd.Function):
    """The nine products of one dense gated MLP of as many rows, forward and backward, and nothing else: a yardstick.

    Its weights' gradients are computed and thrown away, as they are no part of the race's arguments.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        torch.mm(rows, gate.t())
        inner = torch.mm(rows, up.t())
        ctx.save_for_backward(rows, inner, gate, up, down)
        return torch.mm(inner, down.t())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        rows, inner, gate, up, down = ctx.saved_tensors
        (dout,) = grads
        torch.mm(dout.t(), inner)
        dinner = torch.mm(dout, down)
        torch.mm(dinner.t(), rows)
        torch.mm(dinner.t(), rows)
        return torch.addmm(torch.mm(dinner, gate), dinner, up), None, None, None


def dense_products(rows: torch.Tensor, counts: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """All rows through the products of the first expert."""
    del counts
    out: torch.Tensor = DenseProducts.apply(rows, *(w.detach()[0] for w in weights))  # type: ignore[no-untyped-call]
    return out


def races(device: torch.device, *, tiny: bool = False) -> list[Race]:
    """bf16, forward and backward, swiglu, 8 and 64 experts with the counts of random routing."""
    num_rows, width, inner = (96, 16, 32) if tiny else (16384, 512, 1024) if device.type == "cpu" else (65536, 2048, 1024)
    made = []
    for experts in (4,) if tiny else (8, 64):
        generator = torch.Generator().manual_seed(experts)
        counts = torch.bincount(torch.randint(0, experts, (num_rows,), generator=generator), minlength=experts)
        rows = torch.randn(num_rows, width, device=device).bfloat16()
        shapes = [(inner, width), (inner, width), (width, inner)]
        weights = tuple((torch.randn(experts, *shape, device=device) * shape[1] ** -0.5).bfloat16() for shape in shapes)
        made.append(
            Race(
                title=f"experts' MLPs bf16 {num_rows} x {width} x {inner}, swiglu, {experts} experts",
                args=(rows, counts.to(device=device, dtype=torch.int32), *weights),
                wanted=(0, 2, 3, 4),
                reference=MLP_IMPLS[-1].fn,
                ours=raced(MLP_IMPLS, device, rows.dtype).fn,
                eager=eager,
                yardsticks={"dense products": dense_products},
                flops=9 * 2 * num_rows * width * inner,
                why_not_compiled="the sizes of the groups are data, and each routing would be another graph",
                notes="goal: at most 1.25 times the dense products, which have no activation, and one expert's weights instead of all",
            )
        )
    return made
