"""With ``engine/deepspeed_config.py``, the only file that knows DeepSpeed.

What DeepSpeed does to a loss is undone here, one comment each; its config is generated there from ours, never written by a user.
It divides state and sums gradients over the ranks of ``ctx.zero`` (data x context parallel); the other axes are ours, and it
learns of them only where it needs to: which ranks share a model, and which of them counts a parameter in the gradient norm.
State goes in and out under logical names, through its tensor-fragment calls, so that nothing outside sees a partition.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import RunConfig
from dist_llm.engine.base import DeviceBatch, LossModule, TrainState
from dist_llm.engine.deepspeed_config import deepspeed_config, import_deepspeed
from dist_llm.kernels.adamw.reference import AdamWStepFn, adamw_step_torch
from dist_llm.optim.adamw import build_adamw, set_learning_rate
from dist_llm.parallel.pipeline import Pipeline, inject
from dist_llm.parallel.state import whole_tensors
from dist_llm.parallel.tied_head import TiedHead
from dist_llm.planning.stages import stage_layers

__all__ = ["DeepSpeedEngine"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Mpu:
    """The questions DeepSpeed asks about model parallelism, answered from the context."""

    def __init__(self, ctx: ParallelContext) -> None:
        self._ctx = ctx

    def get_data_parallel_group(self) -> Any:
        return self._ctx.zero.handle

    def get_data_parallel_world_size(self) -> int:
        return self._ctx.zero.size

    def get_data_parallel_rank(self) -> int:
        return self._ctx.zero.rank

    def get_model_parallel_group(self) -> Any:
        return self._ctx.model.handle

    def get_model_parallel_world_size(self) -> int:
        return self._ctx.model.size

    # Stages 1 and 2 ask for the tensor-parallel rank, stage 3 for the model-parallel one; both want to know whether this rank
    # counts replicated parameters in the gradient norm, and every stage of a pipeline has its own.
    def get_model_parallel_rank(self) -> int:
        return self._ctx.tp.rank

    def get_tensor_model_parallel_rank(self) -> int:
        return self._ctx.tp.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._ctx.tp.size

    def get_tensor_model_parallel_group(self) -> Any:
        return self._ctx.tp.handle

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._ctx.pp.rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._ctx.pp.size


class _Stages(nn.Module):
    """This rank's parts of the model under one module, for DeepSpeed to wrap."""

    def __init__(self, parts: Sequence[LossModule]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, batch: DeviceBatch, hidden: torch.Tensor | None = None, part: int = 0) -> torch.Tensor:
        return self.parts[part](batch, hidden)


_PREFIX = re.compile(r"^parts\.\d+\.model\.")


class DeepSpeedEngine:
    """ZeRO over the data and context parallel ranks, under tensor parallel layers and pipeline stages."""

    def __init__(
        self,
        parts: Sequence[LossModule],
        config: RunConfig,
        state: TrainState,
        ctx: ParallelContext,
        *,
        adamw_step: AdamWStepFn = adamw_step_torch,
    ) -> None:
        deepspeed = import_deepspeed()
        self.loss_module = parts[0]
        self._parts = list(parts)
        self._config = config
        self._ctx = ctx
        self._zero = config.parallel.zero
        self._clip_norm = config.optim.clip_norm
        self._norm: float | None = None
        self._token_divisor = ctx.tp.size if parts[0].model.region.sequence else 1
        module = _Stages(parts)
        self._named = [(_PREFIX.sub("", name), p) for name, p in module.named_parameters()]
        self._by_name = dict(self._named)
        # The weights go in before DeepSpeed divides or rounds them; _load_state puts the unrounded masters in afterwards.
        for part in parts:
            part.model.load_weights({name: state.weights[name] for name, _ in part.model.named_parameters()})
        # Clipping and casts are DeepSpeed's; of ours it is the update alone.
        optimizer = build_adamw(self._named, config.optim, config.model, adamw_step=adamw_step)
        # It insists on this variable, which srun does not set; what it says is what the context says.
        os.environ["LOCAL_RANK"] = str(ctx.local_rank)
        # It prints memory figures to stdout, which belongs to the answers of our commands.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=deepspeed_config(config, ctx.zero.size),
                mpu=_Mpu(ctx),
                dist_init_required=False,
            )
        self._basic = self._engine.basic_optimizer
        if self._zero == 3:
            # The objective reads the head's weight outside the module that owns it: ZeRO-3 must gather it for this forward.
            deepspeed.zero.register_external_parameter(parts[0], parts[0].model.head_weight)
        self._pipeline: Pipeline | None = None
        self._tied: TiedHead | None = None
        if ctx.pp.size > 1:
            chunks = config.parallel.chunks
            self._pipeline = Pipeline(ctx, schedule=config.parallel.schedule, chunks=chunks, dtype=parts[0].model.compute_dtype)
            if config.model.tie_embeddings and ctx.ends.size > 1:
                first, last = parts[0].model, parts[-1].model
                self._tied = TiedHead(ctx.ends, first=first if ctx.is_first_stage else None, last=last if ctx.is_last_stage else None)
        self._load_state(state)

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline of the last step, for whoever draws its timeline; None without one."""
        return self._pipeline

    def train_step(self, batches: Sequence[DeviceBatch], *, num_tokens: int, lr: float) -> tuple[torch.Tensor, float]:
        """See ``Engine.train_step``."""
        set_learning_rate(self._basic, lr)
        # DeepSpeed averages gradients over its group; we want their sum.
        factor = self._ctx.zero.size / num_tokens
        if self._pipeline is not None:
            total = self._pipelined(self._pipeline, batches, factor)
        else:
            total = torch.zeros((), device=batches[0].tokens.device)
            for i, batch in enumerate(batches):
                # Told, not counted by it (its own count assumes that every step has the configured number of micro-batches), and
                # told before the forward, in which ZeRO-1 drops what it accumulated if it thinks that a step has ended.
                self._engine.set_gradient_accumulation_boundary(i + 1 == len(batches))
                nll = self._engine(batch)
                self._backward(nll * factor)
                total += nll.detach()
            self._step()
        norm = self._norm if self._zero == 0 else self._engine.get_global_grad_norm()
        assert norm is not None, "DeepSpeed took a step without a gradient norm"
        return total, float(norm)

    def _backward(self, loss: torch.Tensor) -> None:
        # scale_wrt_gas=False: it would also divide by the number of micro-batches; num_tokens has counted them all.
        self._engine.backward(loss, scale_wrt_gas=False)

    def _step(self) -> None:
        if self._zero == 0:
            self._norm = self._clip()
        self._engine.step()

    def _pipelined(self, pipeline: Pipeline, batches: Sequence[DeviceBatch], factor: float) -> torch.Tensor:
        total = torch.zeros((), device=batches[0].tokens.device)
        self._engine.set_gradient_accumulation_boundary(False)
        if self._tied is not None:
            self._tied.lend()

        def forward(micro: int, chunk: int, hidden: torch.Tensor | None) -> torch.Tensor:
            nonlocal total
            out = self._engine(batches[micro], hidden, chunk)
            if pipeline.is_last(chunk):
                total = total + out.detach()
            return out

        def backward(micro: int, chunk: int, out: torch.Tensor, grad: torch.Tensor | None, is_last: bool) -> None:
            loss = out * factor if grad is None else inject(out, grad)
            if is_last and self._tied is not None and self._tied.owner is not None:
                # The last stage sent it before its own end, and this stage comes after all others.
                weight = self._tied.owner.embedding.weight
                loss = loss + inject(weight, self._tied.receive_gradient().to(weight.dtype))
            self._backward(loss)

        pipeline.run([self._hidden_shape(batch) for batch in batches], forward, backward)
        if self._tied is not None and self._tied.owner is None:
            self._tied.send_gradient()
        # Only now, when the stages before have their gradients: a reduction inside the last backward would keep them waiting, and
        # the norm needs all stages.
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()
        self._step()
        return total

    def _hidden_shape(self, batch: DeviceBatch) -> torch.Size:
        rows, tokens = batch.tokens.shape
        return torch.Size((rows, tokens // self._token_divisor, self._config.model.d_model))

    @torch.no_grad()
    def eval_nll(self, batch: DeviceBatch) -> torch.Tensor:
        """See ``Engine.eval_nll``."""
        was_training = self._engine.training
        self._engine.eval()
        if self._pipeline is None:
            nll = self._engine(batch)
        else:
            if self._tied is not None:
                self._tied.lend()
            out = self._pipeline.forward_only(self._hidden_shape(batch), lambda _, chunk, hidden: self._engine(batch, hidden, chunk))
            nll = torch.zeros((), device=batch.tokens.device) if out is None else out
        self._engine.train(was_training)
        return nll

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """See ``Engine.state``."""
        config, ctx = self._config, self._ctx
        stages = stage_layers(config.model, config.data.seq_len, ctx.pp.size * config.parallel.chunks)

        def stage_of(name: str) -> int:
            if name.startswith("blocks."):
                number = int(name.split(".")[1])
                return next(i for i, layers in enumerate(stages) if number in layers) % ctx.pp.size
            return 0 if name.startswith(("embedding.", "positions.")) else ctx.pp.size - 1

        for section, key in (("weights", None), *((moment, moment) for moment in _MOMENTS)):
            # On this rank's device, where collectives want it: what is offloaded comes from the CPU.
            part_of = lambda name, key=key: self._full(self._by_name[name], key).to(ctx.device)  # noqa: E731
            for name, whole in whole_tensors(config.model, ctx, stage_of=stage_of, part=part_of):
                yield section, name, whole

    def close(self) -> None:
        """Let DeepSpeed remove its hooks; the process group belongs to whoever made it."""
        self._engine.destroy()

    def _clip(self) -> float:
        # After the last backward the gradients are reduced over the data-parallel ranks; the parts of the model are on others.
        counted = [p.grad for _, p in self._named if p.grad is not None and (getattr(p, "model_parallel", False) or self._ctx.tp.rank == 0)]
        square = torch.nn.utils.get_total_norm(counted).square()
        if self._ctx.model.size > 1:
            dist.all_reduce(square, group=self._ctx.model.handle)
        norm = square.sqrt()
        if self._clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_([p for _, p in self._named], self._clip_norm, norm)
        return float(norm)

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
            flat = torch.nn.functional.pad(value.flatten(), (0, part * self._ctx.zero.size - value.numel()))
            mine = flat.narrow(0, rank * part, part).to(partition.device)
            if key is None:
                safe_set_local_fp32_param(parameter, mine)
            else:
                safe_set_local_optimizer_state(parameter, mine, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
