"""``bench adamw``: norm, clipping, AdamW and the bf16 copies of the parameters, of whole models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim.adamw import adamw

from dist_llm.bench.kernels.case import Race, raced
from dist_llm.kernels.adamw import IMPLS, SUM_OF_SQUARES_IMPLS
from dist_llm.kernels.adamw.reference import AdamWStepFn, SumOfSquaresFn

__all__ = ["model_shapes", "races"]

CLIP_NORM = 1.0
STEP = 10
OPTIONS: dict[str, Any] = {"lr": 3e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

Tensors = list[torch.Tensor]


def model_shapes(layers: int, dim: int, vocab: int, seq_len: int) -> list[tuple[int, ...]]:
    """Parameters of a GPT-2 with tied embeddings."""
    block: list[tuple[int, ...]] = [(dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
    block += [(dim,), (dim,), (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    return [(vocab, dim), (seq_len, dim), *block * layers, (dim,), (dim,)]


def clipped(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    copies: Tensors,
    *,
    step_fn: AdamWStepFn,
    sum_fn: SumOfSquaresFn,
) -> None:
    """As the plain engine does it."""
    factor = (CLIP_NORM / (sum_fn(grads).sqrt() + 1e-6)).clamp(max=1.0)
    step_fn(params, grads, exp_avgs, exp_avg_sqs, step=STEP, grad_scale=factor, copies=copies, **OPTIONS)


@torch.no_grad()
def torchs_own(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, copies: Tensors, *, fused: bool) -> None:
    """torch's clipping, its AdamW and a copy, each over all tensors at once."""
    norm = torch.nn.utils.get_total_norm(grads)
    torch._foreach_mul_(grads, (CLIP_NORM / (norm + 1e-6)).clamp(max=1.0))
    # It counts the step itself.
    steps = [torch.full((), float(STEP - 1), device=p.device if fused else None) for p in params]
    fn: Callable[..., None] = partial(adamw, fused=True) if fused else partial(adamw, foreach=True)
    fn(params, grads, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, maximize=False, **OPTIONS)
    torch._foreach_copy_(copies, params)


def races(device: torch.device) -> list[Race]:
    """fp32 parameters, gradients and moments, bf16 copies; the first is the model of ``bench step``."""
    made = []
    models = [(6, 384, 65, 256), (12, 512, 2048, 1024)] if device.type == "cpu" else [(12, 768, 50304, 1024), (24, 1024, 50304, 1024)]
    for layers, dim, vocab, seq_len in models:
        shapes = model_shapes(layers, dim, vocab, seq_len)

        def draw(scale: float, shapes: list[tuple[int, ...]] = shapes) -> Tensors:
            return [scale * torch.randn(shape, device=device) for shape in shapes]

        params, grads, exp_avgs = draw(0.02), draw(1e-3), draw(1e-4)
        exp_avg_sqs = [v.square() for v in draw(1e-3)]
        count = sum(p.numel() for p in params)
        ours, reference = (
            partial(clipped, step_fn=step.fn, sum_fn=sums.fn)
            for step, sums in (
                (raced(IMPLS, device, torch.float32), raced(SUM_OF_SQUARES_IMPLS, device, torch.float32)),
                (IMPLS[-1], SUM_OF_SQUARES_IMPLS[-1]),
            )
        )
        made.append(
            Race(
                title=f"clip, AdamW and cast, {count / 1e6:.1f} M parameters",
                args=(params, grads, exp_avgs, exp_avg_sqs, [p.bfloat16() for p in params]),
                wanted=(),
                changed=(0, 2, 3, 4),
                reference=reference,
                ours=ours,
                eager=partial(torchs_own, fused=True),
                compiles=False,
                peers={"foreach": partial(torchs_own, fused=False)},
                # The gradients twice, parameters and moments in and out, the copies.
                moved_bytes=34 * count,
            )
        )
    return made
