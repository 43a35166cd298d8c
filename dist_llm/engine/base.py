"""What the loop asks of an engine, whoever does the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from dist_llm.data.rows import IGNORE
from dist_llm.kernels.cross_entropy.reference import CrossEntropyFn, cross_entropy_reference
from dist_llm.models.decoder import Decoder
from dist_llm.objectives.next_token import next_token_nll
from dist_llm.parallel.pipeline import Pipeline

__all__ = ["DeviceBatch", "Engine", "LossModule", "TrainState"]


@dataclass(frozen=True)
class DeviceBatch:
    """One micro-batch of one rank, on its device: some rows, and under context parallelism some of their columns."""

    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, IGNORE where nothing is predicted
    positions: torch.Tensor  # (B, T) int64
    doc_ids: torch.Tensor | None  # (B, T) int32; None: a row is one text
    samples: torch.Tensor | None = None  # (B,) int64, global sample numbers
    columns: torch.Tensor | None = None  # (T,) int64, index of each token in its row


class LossModule(nn.Module):
    """The model, or a stage of it, with its objective: everything differentiable happens in one forward."""

    def __init__(self, model: Decoder, cross_entropy: CrossEntropyFn = cross_entropy_reference) -> None:
        super().__init__()
        self.model = model
        self.cross_entropy = cross_entropy

    def forward(self, batch: DeviceBatch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of -log p over the valid targets of ``batch``, scalar float32; hidden states on a stage that is not the last.

        Args:
            batch: the micro-batch.
            hidden: from the stage before; None on the first.
        """
        model = self.model
        x = model(batch.tokens, batch.positions, batch.doc_ids, samples=batch.samples, columns=batch.columns, hidden=hidden)
        if not model.is_last:
            return x
        # The head's columns are divided over tp like those of any matrix.
        x = model.region.enter(x)
        return next_token_nll(x, model.head_weight, batch.targets, ignore=IGNORE, cross_entropy=self.cross_entropy)


@dataclass(frozen=True)
class TrainState:
    """Everything besides the position in the data that the next step depends on: this rank's parts, under logical names, fp32."""

    weights: dict[str, torch.Tensor]
    exp_avg: dict[str, torch.Tensor] | None = None  # None: no step taken yet
    exp_avg_sq: dict[str, torch.Tensor] | None = None
    steps_taken: int = 0


class Engine(Protocol):
    """One training step and the state around it."""

    loss_module: LossModule

    @property
    def pipeline(self) -> Pipeline | None:
        """What knows when each action of the last step ran; None without a pipeline."""
        ...

    def train_step(self, batches: Sequence[DeviceBatch], *, num_tokens: int, lr: float) -> tuple[torch.Tensor, float]:
        """Take one optimiser step on the micro-batches of this rank.

        Args:
            batches: this rank's micro-batches.
            num_tokens: valid targets in the global batch, by which the summed loss is divided.
            lr: rate of this step.

        Returns:
            the summed loss of its micro-batches in nats (zero on a stage without a loss; every tp rank has the same one), and
            the global gradient norm before clipping.
        """
        ...

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(section, logical name, fp32 tensor); every rank iterates to the end, on the main rank each tensor is whole."""
        ...

    def eval_nll(self, batch: DeviceBatch) -> torch.Tensor:
        """The summed loss without gradients; zero on a stage without a loss."""
        ...

    def close(self) -> None:
        """Let go of the process group and whatever hangs on it."""
        ...
