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

__all__ = ["DeviceBatch", "Engine", "LossModule", "TrainState"]


@dataclass(frozen=True)
class DeviceBatch:
    """One micro-batch of one rank, on its device."""

    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, IGNORE where nothing is predicted
    positions: torch.Tensor  # (B, T) int64
    doc_ids: torch.Tensor | None  # (B, T) int32; None: a row is one text


class LossModule(nn.Module):
    """The model with its objective: the module an engine calls, so that everything differentiable happens in one forward."""

    def __init__(self, model: Decoder, cross_entropy: CrossEntropyFn = cross_entropy_reference) -> None:
        super().__init__()
        self.model = model
        self.cross_entropy = cross_entropy

    def forward(self, batch: DeviceBatch) -> torch.Tensor:
        """Sum of -log p over the valid targets of ``batch``; scalar float32."""
        hidden = self.model(batch.tokens, batch.positions, batch.doc_ids)
        return next_token_nll(hidden, self.model.head_weight, batch.targets, ignore=IGNORE, cross_entropy=self.cross_entropy)


@dataclass(frozen=True)
class TrainState:
    """Everything besides the position in the data that the next step depends on, under logical names, fp32."""

    weights: dict[str, torch.Tensor]
    exp_avg: dict[str, torch.Tensor] | None = None  # None: no step taken yet
    exp_avg_sq: dict[str, torch.Tensor] | None = None
    steps_taken: int = 0


class Engine(Protocol):
    """One training step and the state around it."""

    loss_module: LossModule

    def train_step(self, batches: Sequence[DeviceBatch], *, num_tokens: int, lr: float) -> tuple[torch.Tensor, float]:
        """Take one optimiser step on the micro-batches of this rank.

        Args:
            batches: this rank's micro-batches.
            num_tokens: valid targets in the global batch, by which the summed loss is divided.
            lr: rate of this step.

        Returns:
            this rank's summed loss in nats, and the global gradient norm before clipping.
        """
        ...

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(section, logical name, whole fp32 tensor); every rank iterates to the end."""
        ...

    def eval_nll(self, batch: DeviceBatch) -> torch.Tensor:
        """This rank's summed loss without gradients."""
        ...

    def close(self) -> None:
        """Let go of the process group and whatever hangs on it."""
        ...
