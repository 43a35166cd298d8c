"""AdamW in groups: matrices are decayed, vectors (norm gains, biases) are not; under muP hidden matrices have a rate of their own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dist_llm.config.schema import ModelConfig, OptimConfig
from dist_llm.kernels.adamw.reference import AdamWStepFn, adamw_step_torch
from dist_llm.optim.fused_adamw import FusedAdamW
from dist_llm.planning.mup import parameter_scaling

__all__ = ["build_adamw", "set_learning_rate"]

_SCALE = "lr_scale"  # of a group; an optimiser carries keys it does not know along


def build_adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    optim: OptimConfig,
    model: ModelConfig | None = None,
    *,
    adamw_step: AdamWStepFn = adamw_step_torch,
) -> FusedAdamW:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), fused on CPU and CUDA.

    Args:
        named_parameters: logical names and parameters; under tensor parallelism the parts of this rank.
        optim: rates of the base width.
        model: whose ``mup_base_width`` scales rate and decay by parameter; None: no scaling.
        adamw_step: an implementation of ``kernels/adamw``; torch's own unless a run chose another.
    """
    # Matrices first, then vectors, in the order of the model; without muP these are all groups there are.
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        is_vector = parameter.ndim < 2
        scaling = None if model is None else parameter_scaling(name, tuple(parameter.shape), model)
        lr_scale, decay_scale = (1.0, 1.0) if scaling is None else (scaling.lr, scaling.weight_decay)
        groups.setdefault((is_vector, lr_scale, decay_scale), []).append(parameter)
    return FusedAdamW(
        [
            {
                "params": parameters,
                "lr": optim.lr * lr_scale,
                "weight_decay": 0.0 if is_vector else optim.weight_decay * decay_scale,
                _SCALE: lr_scale,
            }
            for (is_vector, lr_scale, decay_scale), parameters in sorted(groups.items(), key=lambda group: group[0][0])
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        adamw_step=adamw_step,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate of this step, scaled as ``build_adamw`` scaled it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[_SCALE]
