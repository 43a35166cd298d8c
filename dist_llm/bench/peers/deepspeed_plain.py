"""The plain model in DeepSpeed's engine at ZeRO stage 0 with its own bf16 mode: a peer of ``bench step``."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
import torch.nn.functional as F

from dist_llm.bench.peers.gpt import PlainGPT
from dist_llm.config.schema import OptimConfig
from dist_llm.engine.deepspeed_config import import_deepspeed

__all__ = ["DeepSpeedPlainStep"]


class DeepSpeedPlainStep:
    """forward, engine.backward, engine.step; bf16 weights, fp32 masters. Needs an initialised process group."""

    def __init__(self, model: PlainGPT, optim: OptimConfig, *, batch_size: int) -> None:
        deepspeed = import_deepspeed()
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        plain = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
        config = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.clip_norm,
            "zero_optimization": {"stage": 0},
            "bf16": {"enabled": True},
            # At stage 0 DeepSpeed has no fp32 accumulation of bf16 gradients; with one micro-batch there is nothing to accumulate.
            "data_types": {"grad_accum_dtype": "bf16"},
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
        }
        masters = [p.detach().clone() for p in (*decayed, *plain)]
        # It prints memory figures to stdout, which belongs to the answer of the race.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
        # To allocate the moments it has taken a step with zero gradients, which AdamW has counted: the bias corrections of all steps to
        # come would be those of the next. The masters were rounded to bf16 before that, and decayed by it.
        wrapped = self.engine.optimizer
        for state in wrapped.optimizer.state.values():
            state["step"].zero_()
        for master, before in zip((p for group in wrapped.fp32_groups for p in group), masters, strict=True):
            master.data.copy_(before)

    def backward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss; its gradients are in the engine's module."""
        loss = F.cross_entropy(self.engine(tokens).float().flatten(0, 1), targets.flatten())
        self.engine.backward(loss)
        return loss.detach()

    def gradients(self) -> dict[str, torch.Tensor]:
        """As ``PlainStep.gradients``."""
        return {name: p.grad for name, p in self.engine.module.named_parameters() if p.grad is not None}

    def update(self) -> None:
        """Clip, and step with the gradients."""
        self.engine.step()
