"""AdamW with two groups: matrices are decayed, vectors (norm gains, biases) are not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dist_llm.config.schema import OptimConfig

__all__ = ["build_adamw", "set_learning_rate"]


def build_adamw(named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW (Loshchilov and Hutter, arXiv:1711.05101).

    Fused runs on CPU and CUDA, one pass over memory, and keeps its step count on the device.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in named_parameters:
        (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
