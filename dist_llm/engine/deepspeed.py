"""The only file that knows DeepSpeed.

What DeepSpeed does to a loss is undone here, one comment each; its config is generated from ours and never written by a user.
State goes in and out whole and under logical names, through its tensor-fragment calls, so that nothing outside sees a partition.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import RunConfig
from dist_llm.engine.base import DeviceBatch, LossModule, TrainState
from dist_llm.optim.adamw import build_adamw, set_learning_rate

__all__ = ["DeepSpeedEngine", "deepspeed_config", "parameters_are_masters"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


def parameters_are_masters(config: RunConfig) -> bool:
    """True when the module's own parameters are the fp32 masters.

    In bf16, ZeRO 1-3 keep the masters in their partitions and the module in bf16. Stage 0 has no fp32 accumulation for bf16
    parameters (DeepSpeed raises NotImplementedError for the mix), so there the module stays fp32 and its layers cast, as in
    the plain engine: the precision table holds at every stage.
    """
    return config.precision == "fp32" or config.parallel.zero == 0


def deepspeed_config(config: RunConfig, dp_size: int) -> dict[str, Any]:
    """DeepSpeed's config for this run, from our precision table and batch arithmetic."""
    micro = config.train.micro_batch_size
    return {
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.train.batch_size // (micro * dp_size),
        # Stage 0 clips without telling the norm; we do it there, see DeepSpeedEngine._clip.
        "gradient_clipping": config.optim.clip_norm if config.parallel.zero > 0 else 0.0,
        "bf16": {"enabled": not parameters_are_masters(config)},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": config.parallel.zero,
            # On one stream (CPU) overlap has nothing to overlap with; on CUDA it hides the reduction behind backward.
            "overlap_comm": torch.cuda.is_available() and config.parallel.zero > 0,
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW with fused=True is ours to vouch for: tests compare it
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """ZeRO 0-3 over the data-parallel ranks."""

    def __init__(self, loss_module: LossModule, config: RunConfig, state: TrainState, ctx: ParallelContext) -> None:
        deepspeed = _import_deepspeed()
        self.loss_module = loss_module
        self._dp_size = ctx.dp.size
        self._zero = config.parallel.zero
        self._clip_norm = config.optim.clip_norm
        # The weights go in before DeepSpeed divides or rounds them; _load_state puts the unrounded masters in afterwards.
        loss_module.model.load_weights(state.weights)
        optimizer = build_adamw(loss_module.model.named_parameters(), config.optim)
        # It insists on this variable, which srun does not set; what it says is what the context says.
        os.environ["LOCAL_RANK"] = str(ctx.local_rank)
        # It prints memory figures to stdout, which belongs to the answers of our commands.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=loss_module,
                optimizer=optimizer,
                config=deepspeed_config(config, ctx.dp.size),
                dist_init_required=False,
            )
        self._basic = self._engine.basic_optimizer
        self._named = [(name.removeprefix("model."), p) for name, p in loss_module.named_parameters()]
        if self._zero == 3:
            # The objective reads the head's weight outside the module that owns it: ZeRO-3 must gather it for this forward.
            deepspeed.zero.register_external_parameter(loss_module, loss_module.model.head_weight)
        self._load_state(state)

    def train_step(self, batches: Sequence[DeviceBatch], *, num_tokens: int, lr: float) -> tuple[torch.Tensor, float]:
        """See ``Engine.train_step``."""
        total = torch.zeros((), device=batches[0].tokens.device)
        set_learning_rate(self._basic, lr)
        norm: float | torch.Tensor | None = None
        for i, batch in enumerate(batches):
            nll = self._engine(batch)
            # DeepSpeed averages gradients over its data-parallel group; we want their sum.
            loss = nll / num_tokens * self._dp_size
            # scale_wrt_gas=False: it would also divide by the number of micro-batches; num_tokens has counted them all.
            self._engine.backward(loss, scale_wrt_gas=False)
            if self._zero == 0 and i == len(batches) - 1:
                norm = self._clip()
            self._engine.step()  # acts at the last micro-batch only
            total += nll.detach()
        if self._zero > 0:
            norm = self._engine.get_global_grad_norm()
        assert norm is not None, "DeepSpeed took a step without a gradient norm"
        return total, float(norm)

    @torch.no_grad()
    def eval_nll(self, batch: DeviceBatch) -> torch.Tensor:
        """See ``Engine.eval_nll``."""
        was_training = self._engine.training
        self._engine.eval()
        nll = self._engine(batch)
        self._engine.train(was_training)
        return nll

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """See ``Engine.state``."""
        for name, parameter in self._named:
            yield "weights", name, self._full(parameter, None)
        for key in _MOMENTS:
            for name, parameter in self._named:
                yield key, name, self._full(parameter, key)

    def close(self) -> None:
        """Let DeepSpeed remove its hooks; the process group belongs to whoever made it."""
        self._engine.destroy()

    def _clip(self) -> torch.Tensor:
        # After the last backward the gradients are reduced already, and whole on every rank.
        parameters = [p for _, p in self._named]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        return norm

    def _load_state(self, state: TrainState) -> None:
        """Put masters, moments and step count where this stage keeps them.

        The moments are created here at once, zero on a fresh start, as AdamW would at its first step: DeepSpeed makes them
        lazily, which would leave nothing to load into.
        """
        for flat in self._master_tensors():
            self._basic.state[flat] = {
                "step": torch.tensor(float(state.steps_taken), device=flat.device),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
            }
        if self._zero in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._named:
            self._set_full(parameter, state.weights[name], None)
            if state.exp_avg is not None and state.exp_avg_sq is not None:
                self._set_full(parameter, state.exp_avg[name], "exp_avg")
                self._set_full(parameter, state.exp_avg_sq[name], "exp_avg_sq")

    def _master_tensors(self) -> list[torch.Tensor]:
        # Stage 3 steps one sub-group at a time and keeps the optimiser's groups empty in between.
        if self._zero == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._basic.param_groups for p in group["params"]]

    def _full(self, parameter: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._zero == 0:
            return parameter.detach() if key is None else self._basic.state[parameter][key]
        if key is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def _set_full(self, parameter: torch.nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(dtype=torch.float32)
        if self._zero == 0:
            (parameter.data if key is None else self._basic.state[parameter][key]).copy_(value)
        elif self._zero == 3:
            # Its "full" setter cuts the last rank's part without padding and fails where the ranks do not divide the size.
            partition: Any = parameter.ds_tensor  # type: ignore[attr-defined]  # put there by ZeRO-3
            part = partition.ds_numel
            rank = self._engine.optimizer._get_param_partition_rank(parameter)
            flat = torch.nn.functional.pad(value.flatten(), (0, part * self._dp_size - value.numel()))
            mine = flat.narrow(0, rank * part, part).to(partition.device)
            if key is None:
                safe_set_local_fp32_param(parameter, mine)
            else:
                safe_set_local_optimizer_state(parameter, mine, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)


def _import_deepspeed() -> Any:
    # Its logger speaks at INFO of every buffer; our console says what a user needs.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what it finds by itself too, with a warning on every rank
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The shared-memory all-reduce would be compiled at the first launch (half a minute, and a lock file that a killed run
    # leaves behind for the next one to hang on). Gloo and NCCL do the work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
