"""The single-process engine, and the oracle of every other one: PyTorch, nothing else.

Parameters are the fp32 masters; layers cast them to the compute dtype where they use them, so that gradients arrive and
accumulate in fp32 without a second copy of anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dist_llm.config.schema import OptimConfig
from dist_llm.engine.base import DeviceBatch, LossModule, TrainState
from dist_llm.kernels.adamw.reference import (
    AdamWStepFn,
    SumOfSquaresFn,
    adamw_step_torch,
    global_sum_of_squares_reference,
)
from dist_llm.optim.adamw import build_adamw, set_learning_rate

__all__ = ["PlainEngine"]


class PlainEngine:
    """One rank, no process group, no DeepSpeed.

    Clipping and the update are one pass over memory, after one that finds the norm.
    """

    pipeline = None

    def __init__(
        self,
        loss_module: LossModule,
        optim: OptimConfig,
        state: TrainState,
        *,
        adamw_step: AdamWStepFn = adamw_step_torch,
        sum_of_squares: SumOfSquaresFn = global_sum_of_squares_reference,
    ) -> None:
        self.loss_module = loss_module
        self._model = loss_module.model
        self._clip_norm = optim.clip_norm
        self._model.load_weights(state.weights)
        self._optimizer = build_adamw(self._model.named_parameters(), optim, self._model.config, adamw_step=adamw_step)
        self._sum_of_squares = sum_of_squares
        if state.exp_avg is not None and state.exp_avg_sq is not None:
            for name, parameter in self._model.named_parameters():
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.steps_taken)),
                    "exp_avg": state.exp_avg[name].to(parameter.device, copy=True),
                    "exp_avg_sq": state.exp_avg_sq[name].to(parameter.device, copy=True),
                }

    def train_step(self, batches: Sequence[DeviceBatch], *, num_tokens: int, lr: float) -> tuple[torch.Tensor, float]:
        """See ``Engine.train_step``."""
        total = torch.zeros((), device=batches[0].tokens.device)
        for batch in batches:
            nll = self.loss_module(batch)
            (nll / num_tokens).backward()  # backward adds into .grad: that sum is the accumulation
            total += nll.detach()
        grads = [p.grad for p in self._model.parameters() if p.grad is not None]
        norm = self._sum_of_squares(grads).sqrt()
        set_learning_rate(self._optimizer, lr)
        # The factor stays a tensor: on a GPU the update is launched before the norm is known here. 1e-6 is torch's own guard.
        self._optimizer.step(grad_scale=(self._clip_norm / (norm + 1e-6)).clamp(max=1.0) if self._clip_norm > 0 else 1.0)
        self._optimizer.zero_grad(set_to_none=True)
        return total, float(norm)

    @torch.no_grad()
    def eval_nll(self, batch: DeviceBatch) -> torch.Tensor:
        """See ``Engine.eval_nll``."""
        was_training = self.loss_module.training
        self.loss_module.eval()
        nll = self.loss_module(batch)
        self.loss_module.train(was_training)
        return nll

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """See ``Engine.state``."""
        named = list(self._model.named_parameters())
        for name, parameter in named:
            yield "weights", name, parameter.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            for name, parameter in named:
                value = self._optimizer.state[parameter].get(key) if parameter in self._optimizer.state else None
                yield key, name, torch.zeros_like(parameter) if value is None else value

    def close(self) -> None:
        """Nothing to let go of."""
