"""DeepSpeed as it is set up here: its config from ours, and nothing compiled at first use."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from dist_llm.config.schema import RunConfig

__all__ = ["deepspeed_config", "import_deepspeed", "parameters_are_masters"]


def parameters_are_masters(config: RunConfig) -> bool:
    """True when the module's own parameters are the fp32 masters.

    In bf16, ZeRO 1-3 keep the masters in their partitions and the module in bf16. Stage 0 has no fp32 accumulation for bf16
    parameters (DeepSpeed raises NotImplementedError for the mix), so there the module stays fp32 and its layers cast, as in
    the plain engine: the precision table holds at every stage.
    """
    return config.precision == "fp32" or config.parallel.zero == 0


def deepspeed_config(config: RunConfig, zero_size: int) -> dict[str, Any]:
    """DeepSpeed's config for this run, from our precision table and batch arithmetic.

    Args:
        config: the run.
        zero_size: data parallel ranks times context parallel ones.
    """
    micro, parallel = config.train.micro_batch_size, config.parallel
    accumulation = config.train.batch_size * parallel.cp // (micro * zero_size)
    zero: dict[str, Any] = {
        "stage": parallel.zero,
        # On one stream (CPU) overlap has nothing to overlap with; on CUDA it hides the reduction behind backward.
        "overlap_comm": torch.cuda.is_available() and parallel.zero > 0,
    }
    if parallel.offload_optimizer != "none":
        zero["offload_optimizer"] = _offload(parallel.offload_optimizer)
    if parallel.offload_parameters != "none":
        zero["offload_param"] = _offload(parallel.offload_parameters)
    return {
        # It checks that this is the product of the next two and its ranks, of which cp share the same rows.
        "train_batch_size": config.train.batch_size * parallel.cp,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        # Stage 0 clips without telling the norm; we do it there, see DeepSpeedEngine._clip.
        "gradient_clipping": config.optim.clip_norm if parallel.zero > 0 else 0.0,
        "bf16": {"enabled": not parameters_are_masters(config)},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW with fused=True is ours to vouch for: tests compare it
        "zero_force_ds_cpu_optimizer": False,  # the same with offload: its own CPU optimiser would be compiled at first use
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _offload(where: str) -> dict[str, Any]:
    return {"device": where, "pin_memory": torch.cuda.is_available()}


def import_deepspeed() -> Any:
    """The package, quiet, on this machine's accelerator and without what it would compile at first use."""
    # Its logger speaks at INFO of every buffer; our console says what a user needs.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what it finds by itself too, with a warning on every rank
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The shared-memory all-reduce would be compiled at the first launch (half a minute, and a lock file that a killed run
    # leaves behind for the next one to hang on). Gloo and NCCL do the work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
