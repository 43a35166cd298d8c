"""``bench adamw``: norm, clipping and AdamW of whole models, with bf16 copies of the parameters and without."""

from __future__ import annotations

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

NOT_COMPILED = "the fused kernel is one op to it already; foreach compiled for a minute and then took 1.6 times the fused kernel's time (one Zen 5 core)"

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
    steps: Tensors,
    *,
    step_fn: AdamWStepFn,
    sum_fn: SumOfSquaresFn,
) -> None:
    """As ``FusedAdamW`` does it for the plain engine, which has no copies: its layers cast the masters where they use them."""
    del steps
    factor = (CLIP_NORM / (sum_fn(grads).sqrt() + 1e-6)).clamp(max=1.0)
    step_fn(params, grads, exp_avgs, exp_avg_sqs, step=STEP, grad_scale=factor, copies=copies or None, **OPTIONS)


@torch.no_grad()
def fused(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, copies: Tensors, steps: Tensors) -> None:
    """torch's norm, its fused AdamW, which divides the gradients by the norm on its way, and a copy."""
    norm = torch.nn.utils.get_total_norm(grads)
    scale = ((norm + 1e-6) / CLIP_NORM).clamp(min=1.0)
    adamw(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, fused=True, grad_scale=scale, amsgrad=False, maximize=False, **OPTIONS
    )  # fmt: skip
    if copies:
        torch._foreach_copy_(copies, params)


@torch.no_grad()
def foreach(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, copies: Tensors, steps: Tensors) -> None:
    """torch's clipping, its AdamW and a copy, each over all tensors at once."""
    norm = torch.nn.utils.get_total_norm(grads)
    torch._foreach_mul_(grads, (CLIP_NORM / (norm + 1e-6)).clamp(max=1.0))
    on_device = params[0].is_cuda  # then so are the steps
    adamw(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, foreach=True, capturable=on_device, amsgrad=False, maximize=False, **OPTIONS
    )  # fmt: skip
    if copies:
        torch._foreach_copy_(copies, params)


def races(device: torch.device, *, tiny: bool = False) -> list[Race]:
    """fp32 parameters, gradients and moments; the first is the model of ``bench step``, with bf16 copies and, as the plain engine, without."""
    step_model = (6, 384, 65, 256)
    models = [(step_model, True), (step_model, False), ((12, 512, 2048, 1024), True)]
    if device.type == "cuda":
        models = [((12, 768, 50304, 1024), True), ((12, 768, 50304, 1024), False), ((24, 1024, 50304, 1024), True)]
    if tiny:
        models = [((1, 16, 33, 8), True), ((1, 16, 33, 8), False)]
    return [_race(model_shapes(*model), device, has_copies=has_copies) for model, has_copies in models]


def _race(shapes: list[tuple[int, ...]], device: torch.device, *, has_copies: bool) -> Race:
    def draw(scale: float) -> Tensors:
        return [scale * torch.randn(shape, device=device) for shape in shapes]

    params, grads, exp_avgs = draw(0.02), draw(1e-3), draw(1e-4)
    exp_avg_sqs = [v.square() for v in draw(1e-3)]
    copies = [p.bfloat16() for p in params] if has_copies else []
    # torch counts them up itself, ours and the reference are told the step.
    steps = [torch.full((), float(STEP - 1), device=device) for _ in params]
    count = sum(p.numel() for p in params)
    ours, reference = (
        partial(clipped, step_fn=step.fn, sum_fn=sums.fn)
        for step, sums in (
            (raced(IMPLS, device, torch.float32), raced(SUM_OF_SQUARES_IMPLS, device, torch.float32)),
            (IMPLS[-1], SUM_OF_SQUARES_IMPLS[-1]),
        )
    )
    return Race(
        title=f"clip, AdamW{' and cast' if has_copies else ''}, {count / 1e6:.1f} M parameters",
        args=(params, grads, exp_avgs, exp_avg_sqs, copies, steps),
        wanted=(),
        changed=(0, 2, 3),
        copies=(4,) if has_copies else (),
        reference=reference,
        ours=ours,
        eager=fused,
        why_not_compiled=NOT_COMPILED,
        peers={"foreach": foreach},
        # The gradients twice, parameters and moments in and out, the copies.
        moved_bytes=(34 if has_copies else 32) * count,
    )
