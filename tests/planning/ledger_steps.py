"""Real optimiser steps under the ledger, for comparison with the formulas."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dist_llm.comm.context import ParallelContext
from dist_llm.comm.ledger import CommLedger
from dist_llm.config.load import load_config
from dist_llm.config.schema import RunConfig
from dist_llm.engine import deepspeed as engine_deepspeed
from dist_llm.engine.base import DeviceBatch
from dist_llm.engine.build import build_engine, choose_ops
from dist_llm.engine.step import train_step
from dist_llm.parallel.divide import columns_of
from dist_llm.planning.wire import Counts

ROOT = Path(__file__).resolve().parents[2]


def tiny_config(tiny: str, overrides: list[str]) -> RunConfig:
    """A tiny config of two layers."""
    return load_config(ROOT / f"configs/tiny/{tiny}.yaml", ["model.num_layers=2", "data.seq_len=32", *overrides]).config


@dataclass(frozen=True)
class Case:
    """A tiny config, overrides of it, and DeepSpeed settings that the engine leaves at their defaults."""

    tiny: str
    overrides: list[str]
    settings: dict[str, int] = field(default_factory=dict)


class Rows:
    """Made-up rows: what is in them does not change what is sent."""

    def __init__(self, config: RunConfig, ctx: ParallelContext) -> None:
        micro, length = config.train.micro_batch_size, config.data.seq_len
        columns = torch.cat([torch.arange(r.start, r.stop) for r in columns_of(config.parallel, ctx, length)])
        batch = DeviceBatch(
            tokens=(columns * 7 % config.model.vocab_size).expand(micro, -1),
            targets=((columns + 1) * 7 % config.model.vocab_size).expand(micro, -1).contiguous(),
            positions=columns.expand(micro, -1),
            doc_ids=torch.zeros(micro, len(columns), dtype=torch.int32) if config.data.document_mask else None,
            samples=torch.arange(micro),
            columns=columns,
        )
        self._batches = [batch] * (config.train.batch_size // (micro * ctx.dp.size))

    def at(self, next_sample: int) -> tuple[list[DeviceBatch], int]:
        """The same rows at every step."""
        return self._batches, sum(batch.targets.numel() for batch in self._batches)


def count_steps(ctx: ParallelContext, cases: list[Case]) -> list[list[Counts]]:
    """What passed in each of the first steps of each case, until it should be steady twice."""
    answers = []
    generated = engine_deepspeed.deepspeed_config
    with CommLedger() as ledger:
        ledger.name_groups(ctx.named_groups())
        for case in cases:
            config = tiny_config(case.tiny, case.overrides)

            def with_settings(config: RunConfig, zero_size: int, settings: dict[str, int] = case.settings) -> dict[str, Any]:
                answer = generated(config, zero_size)
                answer["zero_optimization"].update(settings)
                return answer

            engine_deepspeed.deepspeed_config = with_settings
            engine = build_engine(config, ctx, choose_ops(config, ctx), None)
            rows = Rows(config, ctx)
            counts = []
            # ZeRO-3 learns the order of modules in the first two passes.
            for _ in range(4 if config.parallel.zero == 3 else 2):
                ledger.take_counts()
                train_step(engine, ctx, rows, next_sample=0, lr=1e-3, stop_code=0)  # type: ignore[arg-type]  # Rows is a StepBatches in kind
                counts.append(ledger.take_counts())
            answers.append(counts)
            engine.close()
    return answers
