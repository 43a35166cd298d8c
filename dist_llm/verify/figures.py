"""What a few training steps come to, and how far two such results are apart.

Gradients are read out of AdamW's first moment after one step, (1 - beta1) times the clipped gradient: there every engine has them,
summed over all ranks and micro-batches, and every logical element once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import RunConfig
from dist_llm.engine.base import Engine
from dist_llm.engine.batches import Rows, StepBatches
from dist_llm.engine.build import build_engine, choose_ops
from dist_llm.engine.step import StepResult, train_step

__all__ = ["Difference", "Figures", "compare", "take_steps"]

STEPS = 3
# A gradient that is zero in theory (a key bias without rotary positions) is rounding noise of any relative size; it is measured
# against the scale of the model's gradients instead, as is a weight that such gradients alone have moved.
_FLOOR = 1e-3


@dataclass(frozen=True)
class Figures:
    """Losses and gradient norms of all steps, gradients of the first, weights after the last; tensors whole, on the main rank."""

    losses: torch.Tensor  # (steps,) float64
    norms: torch.Tensor  # (steps,) float64
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """One flat mapping, for a safetensors file."""
        named = {"losses": self.losses, "norms": self.norms}
        named |= {f"gradients/{name}": t.contiguous() for name, t in self.gradients.items()}
        return named | {f"weights/{name}": t.contiguous() for name, t in self.weights.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Figures:
        """The inverse of ``to_tensors``; names come in any order."""

        def section(prefix: str) -> dict[str, torch.Tensor]:
            return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

        return cls(tensors["losses"], tensors["norms"], section("gradients/"), section("weights/"))


def take_steps(config: RunConfig, ctx: ParallelContext, rows: Rows, *, steps: int = STEPS) -> Figures:
    """Build the engine of ``config`` and take ``steps`` steps; every rank calls this."""
    engine: Engine = build_engine(config, ctx, choose_ops(config, ctx), None)
    batches = StepBatches(rows, config, ctx)
    losses, norms = [], []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(steps):
        result = train_step(engine, ctx, batches, next_sample=step * config.train.batch_size, lr=config.optim.lr, stop_code=0)
        assert isinstance(result, StepResult)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if step == 0:
            gradients = {
                name: tensor.detach() / (1 - config.optim.beta1) for section, name, tensor in engine.state() if section == "exp_avg"
            }
    weights = {name: tensor.detach().clone() for section, name, tensor in engine.state() if section == "weights"}
    engine.close()
    return Figures(torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64), gradients, weights)


@dataclass(frozen=True)
class Difference:
    """How far a layout is from the plain process; all errors relative."""

    loss: float
    grad_norm: float
    gradient: float
    gradient_of: str  # the tensor with the largest error
    weight: float
    weight_of: str
    first: str | None  # the first quantity beyond the tolerance: loss, then gradients in the model's order, norm, weights

    @property
    def largest(self) -> float:
        """The largest of all errors; NaN counts as infinite."""
        errors = (self.loss, self.grad_norm, self.gradient, self.weight)
        return max(float("inf") if error != error else error for error in errors)


def compare(plain: Figures, other: Figures, *, tolerance: float) -> Difference:
    """Measure ``other`` against ``plain``.

    Error of a gradient: max |difference| / max(max |g| of the tensor, 1e-3 x the largest |g| of the model). Weights likewise.
    Loss and norm: of all steps, relative.
    """
    loss = _relative(plain.losses, other.losses)
    norm = _relative(plain.norms, other.norms)
    gradients, weights = _errors(plain.gradients, other.gradients), _errors(plain.weights, other.weights)
    worst_gradient = max(gradients, key=lambda name: _nan_last(gradients[name]))
    worst_weight = max(weights, key=lambda name: _nan_last(weights[name]))
    candidates = [("loss", loss), *((f"gradient of {n}", e) for n, e in gradients.items()), ("gradient norm", norm)]
    candidates += [(f"weight {n} after {len(plain.losses)} steps", e) for n, e in weights.items()]
    return Difference(
        loss=loss,
        grad_norm=norm,
        gradient=gradients[worst_gradient],
        gradient_of=worst_gradient,
        weight=weights[worst_weight],
        weight_of=worst_weight,
        first=next((what for what, error in candidates if not error <= tolerance), None),
    )


def _relative(plain: torch.Tensor, other: torch.Tensor) -> float:
    return float(((other - plain).abs() / plain.abs()).max())


def _errors(plain: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    if plain.keys() != other.keys():
        raise ValueError(f"tensors of one side only: {sorted(plain.keys() ^ other.keys())[:5]}")
    floor = _FLOOR * max(float(t.abs().max()) for t in plain.values())
    return {name: float((other[name].double() - t.double()).abs().max()) / max(float(t.abs().max()), floor) for name, t in plain.items()}


def _nan_last(error: float) -> float:
    return float("inf") if error != error else error
