"""Learning rate as a pure function of the step: nothing to save, nothing to get out of step after a resume."""

from __future__ import annotations

import math

from dist_llm.config.schema import OptimConfig

__all__ = ["learning_rate"]


def learning_rate(step: int, *, optim: OptimConfig, steps: int) -> float:
    """Rate of optimiser step ``step`` (1 is the first) in a run of ``steps``.

    Warm-up is linear and reaches ``lr`` at step ``warmup_steps``. Then
    cosine: half a cosine from lr to lr * min_lr_ratio at the last step (Loshchilov and Hutter, arXiv:1608.03983);
    wsd: constant, then linear to lr * min_lr_ratio over the last ``decay_steps`` (Hu et al., arXiv:2404.06395);
    constant: lr.
    """
    if not 1 <= step <= steps:
        raise ValueError(f"step {step} is not one of 1..{steps}")
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    floor = optim.lr * optim.min_lr_ratio
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "cosine":
        progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
        return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = optim.decay_steps if optim.decay_steps is not None else max(1, steps // 5)
    left = steps - step
    return optim.lr if left >= decay else floor + (optim.lr - floor) * left / decay
