"""What a few training steps come to, and how far two such results are apart.

Gradients are read out of AdamW's first moment after one step, (1 - beta1) times the clipped gradient: there every engine has them,
summed over all ranks and micro-batches, and every logical element once. What clipping took away is put back by the norm that the
same engine reported, so that a wrong norm does not make every gradient look wrong, nor clipping hide a wrong scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import RunConfig
from dist_llm.engine.base import Engine
from dist_llm.engine.batches import Rows, StepBatches
from dist_llm.engine.build import build_engine, choose_ops
from dist_llm.engine.step import StepResult, train_step
from dist_llm.verify.outputs import OutputSums

__all__ = ["Difference", "Figures", "compare", "take_steps"]

STEPS = 3
# A gradient that is zero in theory (a key bias without rotary positions) is rounding noise of any relative size; it is measured
# against the scale of the model's gradients instead. So is a tensor that began at zero (a bias): after a few steps it is only as
# large as these steps, of which AdamW has made noise wherever a gradient is not far above its eps.
_GRADIENT_FLOOR, _WEIGHT_FLOOR = 1e-3, 1e-2


# What DeepSpeed and torch alike add to the norm before they divide by it.
_CLIP_EPS = 1e-6


@dataclass(frozen=True)
class Figures:
    """Losses, gradient norms and outputs of all steps, gradients of the first, weights after the last; tensors whole, on the main rank."""

    losses: torch.Tensor  # (steps,) float64
    norms: torch.Tensor  # (steps,) float64, before clipping
    gradients: dict[str, torch.Tensor]  # before clipping
    weights: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]  # (steps,) float64: sum of squares of what each part of the model put out

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """One flat mapping, for a safetensors file."""
        named = {"losses": self.losses, "norms": self.norms}
        for section, tensors in (("gradients", self.gradients), ("weights", self.weights), ("outputs", self.outputs)):
            named |= {f"{section}/{name}": t.contiguous() for name, t in tensors.items()}
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Figures:
        """The inverse of ``to_tensors``; names come in any order."""

        def section(prefix: str) -> dict[str, torch.Tensor]:
            return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

        return cls(tensors["losses"], tensors["norms"], section("gradients/"), section("weights/"), section("outputs/"))


def take_steps(config: RunConfig, ctx: ParallelContext, rows: Rows, *, steps: int = STEPS) -> Figures:
    """Build the engine of ``config`` and take ``steps`` steps; every rank calls this."""
    engine: Engine = build_engine(config, ctx, choose_ops(config, ctx), None)
    batches = StepBatches(rows, config, ctx)
    losses, norms = [], []
    outputs: dict[str, list[float]] = {}
    gradients: dict[str, torch.Tensor] = {}
    with OutputSums(config, ctx) as sums:
        for step in range(steps):
            result = train_step(engine, ctx, batches, next_sample=step * config.train.batch_size, lr=config.optim.lr, stop_code=0)
            assert isinstance(result, StepResult)
            losses.append(result.loss)
            norms.append(result.grad_norm)
            for name, value in sums.of_step().items():
                outputs.setdefault(name, []).append(value)
            if step == 0:
                clip = config.optim.clip_norm
                scale = max(1.0, (result.grad_norm + _CLIP_EPS) / clip) if clip > 0 else 1.0
                gradients = {
                    name: tensor.detach() * (scale / (1 - config.optim.beta1))
                    for section, name, tensor in engine.state()
                    if section == "exp_avg"
                }
    weights = {name: tensor.detach().clone() for section, name, tensor in engine.state() if section == "weights"}
    engine.close()
    return Figures(_series(losses), _series(norms), gradients, weights, {name: _series(values) for name, values in outputs.items()})


def _series(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Difference:
    """How far a layout is from the plain process; all errors relative."""

    loss: float
    grad_norm: float
    gradient: float
    gradient_of: str  # the tensor with the largest error
    weight: float
    weight_of: str
    first: str | None  # the first quantity beyond the tolerance, in the order in which a step computes them; None when all are within

    @property
    def largest(self) -> float:
        """The largest of all errors; NaN counts as infinite."""
        errors = (self.loss, self.grad_norm, self.gradient, self.weight)
        return max(float("inf") if error != error else error for error in errors)


def compare(plain: Figures, other: Figures, *, tolerance: float) -> Difference:
    """Measure ``other`` against ``plain``.

    Error of a gradient: max |difference| / max(max |g| of the tensor, 1e-3 x the largest |g| of the model). Weights likewise,
    with 1e-2.
    Loss and norm: of all steps, relative. Outputs do not decide; they say where it began.

    Raises:
        ValueError: the two do not have the same tensors.
    """
    loss, norm = _relative(plain.losses, other.losses), _relative(plain.norms, other.norms)
    gradients, weights = _errors(plain.gradients, other.gradients, _GRADIENT_FLOOR), _errors(plain.weights, other.weights, _WEIGHT_FLOOR)
    worst_gradient = max(gradients, key=lambda name: _nan_last(gradients[name]))
    worst_weight = max(weights, key=lambda name: _nan_last(weights[name]))
    outputs = {name: _relative(values, other.outputs[name]) if name in other.outputs else None for name, values in plain.outputs.items()}
    difference = Difference(
        loss=float(loss.max()),
        grad_norm=float(norm.max()),
        gradient=gradients[worst_gradient],
        gradient_of=worst_gradient,
        weight=weights[worst_weight],
        weight_of=worst_weight,
        first=None,
    )
    if difference.largest <= tolerance:
        return difference
    return replace(difference, first=_first(outputs, loss, gradients, norm, weights, tolerance))


def _first(
    outputs: dict[str, torch.Tensor | None],
    loss: torch.Tensor,
    gradients: dict[str, float],
    norm: torch.Tensor,
    weights: dict[str, float],
    tolerance: float,
) -> str | None:
    """What a step computes before everything else that is beyond the tolerance.

    Outputs come in the order of the forward, gradients in that of the backward: from the head down to the embedding.
    """
    for step in range(len(loss)):
        candidates = [(f"output of {n}", float("inf") if e is None else float(e[step])) for n, e in outputs.items()]
        candidates.append(("loss", float(loss[step])))
        if step == 0:
            candidates += [(f"gradient of {n}", e) for n, e in reversed(gradients.items())]
        candidates.append(("gradient norm", float(norm[step])))
        for what, error in candidates:
            if not error <= tolerance:
                return f"{what} in step {step + 1}"
    return next((f"weight {n} after {len(loss)} steps" for n, e in weights.items() if not e <= tolerance), None)


def _relative(plain: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (other - plain).abs() / plain.abs()


def _errors(plain: dict[str, torch.Tensor], other: dict[str, torch.Tensor], floor: float) -> dict[str, float]:
    if plain.keys() != other.keys():
        raise ValueError(f"tensors of one side only: {sorted(plain.keys() ^ other.keys())[:5]}")
    least = floor * max(float(t.abs().max()) for t in plain.values())
    return {name: float((other[name].double() - t.double()).abs().max()) / max(float(t.abs().max()), least) for name, t in plain.items()}


def _nan_last(error: float) -> float:
    return float("inf") if error != error else error
