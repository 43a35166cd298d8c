"""Started by the deepspeed launcher: trains the same few steps at every ZeRO stage and writes what came out.

usage: zero_program.py --local_rank=R OUT CORPUS PRECISION STEPS
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dist_llm.comm.collectives import all_reduce_sum
from dist_llm.comm.context import ParallelContext
from dist_llm.config.load import load_config
from dist_llm.config.schema import RunConfig
from dist_llm.engine import deepspeed as engine_deepspeed
from dist_llm.engine.attempt import open_rows
from dist_llm.engine.base import Engine
from dist_llm.engine.batches import StepBatches
from dist_llm.engine.build import build_engine, choose_ops
from dist_llm.engine.launch import close_context, open_context
from dist_llm.engine.ranks import read_launch
from dist_llm.engine.step import StepResult, train_step
from dist_llm.optim.schedule import learning_rate

ROOT = Path(__file__).resolve().parent.parent.parent


# Besides the four stages: tied embeddings and biases, whose head is read outside the module that owns it; the same with
# recomputation, which runs forward again inside backward, when ZeRO-3 has let go of the parameters; packed documents.
DIVIDED = "zero3-divided"
OTHERS = {
    "gpt2-zero3": ("gpt2", 3, []),
    "gpt2-zero3-recompute": ("gpt2", 3, ["parallel.recompute=full"]),
    "packed-zero2-recompute": ("packed", 2, ["parallel.recompute=full"]),
    # By default DeepSpeed keeps tensors as small as these whole on every rank, and ZeRO-3 divides nothing.
    f"llama-{DIVIDED}": ("llama", 3, []),
    f"gpt2-{DIVIDED}": ("gpt2", 3, []),
}


@contextlib.contextmanager
def dividing_everything() -> Iterator[None]:
    """Each parameter exists only while its own module runs, as those of a large model do."""
    right = engine_deepspeed.deepspeed_config

    def divided(config: RunConfig, zero_size: int) -> dict[str, Any]:
        answer = right(config, zero_size)
        answer["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
        }  # fmt: skip
        return answer

    engine_deepspeed.deepspeed_config = divided
    try:
        yield
    finally:
        engine_deepspeed.deepspeed_config = right


def config_for(corpus: str, precision: str, steps: int, zero: int, extra: list[str] | None = None, *, tiny: str = "llama") -> RunConfig:
    """A tiny config with an accumulation of at least two micro-batches on two ranks."""
    overrides = [f"data.path={corpus}", f"precision={precision}", f"train.steps={steps}", f"parallel.zero={zero}"]
    overrides += ["train.batch_size=8", "train.micro_batch_size=2", "optim.eps=1e-5", *(extra or [])]
    return load_config(ROOT / f"configs/tiny/{tiny}.yaml", overrides).config


def train(config: RunConfig, ctx: ParallelContext) -> dict[str, torch.Tensor]:
    """Losses, gradient norms, every parameter's gradient at step 1 and the weights at the end.

    AdamW's first moment after one step is (1 - beta1) times the clipped gradient, so it carries every gradient out of any
    engine.
    """
    engine: Engine = build_engine(config, ctx, choose_ops(config, ctx), None)
    rows, _ = open_rows(config)
    batches = StepBatches(rows, config, ctx)
    losses, norms = [], []
    answer: dict[str, torch.Tensor] = {}
    for step in range(1, config.train.steps + 1):
        lr = learning_rate(step, optim=config.optim, steps=config.train.steps)
        result = train_step(engine, ctx, batches, next_sample=(step - 1) * config.train.batch_size, lr=lr, stop_code=0)
        assert isinstance(result, StepResult)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if step == 1:
            for section, name, tensor in engine.state():
                if section == "exp_avg":
                    answer[f"grad/{name}"] = tensor.detach().clone() / (1 - config.optim.beta1)
    for section, name, tensor in engine.state():
        if section == "weights":
            answer[f"weight/{name}"] = tensor.detach().clone()
    answer["losses"] = torch.tensor(losses, dtype=torch.float64)
    answer["norms"] = torch.tensor(norms, dtype=torch.float64)
    engine.close()
    return answer


def main() -> None:
    """Every stage in one launch: a launch costs more than the training."""
    out, corpus, precision, steps = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    ctx = open_context(read_launch(), needs_process_group=True, threads=1)
    try:
        for zero in (0, 1, 2, 3):
            answer = train(config_for(corpus, precision, int(steps), zero), ctx)
            if ctx.is_main:
                save_file(answer, Path(out) / f"zero{zero}.safetensors")
        for name, (tiny, zero, extra) in OTHERS.items() if precision == "fp32" else ():
            with dividing_everything() if name.endswith(DIVIDED) else contextlib.nullcontext():
                answer = train(config_for(corpus, precision, 6, zero, extra, tiny=tiny), ctx)
            if ctx.is_main:
                save_file(answer, Path(out) / f"{name}.safetensors")
        all_reduce_sum([0.0], ctx.world, ctx.device)  # leave together
    finally:
        close_context()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as dist_llm.cli.main.entry, for the same reason
