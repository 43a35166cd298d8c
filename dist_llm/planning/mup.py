"""muP: what changes with width so that the best learning rate does not.

Yang et al. (arXiv:2203.03466), table 8 (equivalent to their tables 3 and 9, and the one for models with a tied or untied head), for
Adam. With m = width / base width, against the values that were tuned at the base width:

| kind | fan-in and fan-out | learning rate | variance of initial weights | multiplier of the output |
| --- | --- | --- | --- | --- |
| input: embeddings, positions | out grows | 1 | 1 | 1 |
| vector: biases, norm weights | out grows | 1 | 1 | 1 |
| hidden: matrices of the blocks | both grow | 1 / m | 1 / m | 1 |
| output: the head | in grows | 1 | 1 | 1 / m |

Attention scores are divided by the head size instead of its root, with the root of the base head size kept as a constant, so that at the
base width nothing changes. Weight decay of AdamW as torch has it is multiplied by the learning rate: to keep its effect on a matrix
whose learning rate falls by m, it has to rise by m.

A config turns it on with ``model.mup_base_width``. One ratio, d_model over that width, then stands for every fan-in: a model is
taken to grow in proportion, its heads and its MLP with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dist_llm.config.schema import ModelConfig

__all__ = ["Kind", "Scaling", "attention_scale", "output_multiplier", "parameter_kind", "parameter_scaling", "scaling", "score_scale"]

Kind = Literal["input", "vector", "hidden", "output"]


@dataclass(frozen=True)
class Scaling:
    """Factors on the base width's values."""

    lr: float
    init_std: float
    output: float  # factor on what the layer gives
    weight_decay: float  # for a decay that the optimiser multiplies by the learning rate


def scaling(kind: Kind, width: int, base_width: int) -> Scaling:
    """Factors of a parameter of ``kind`` in a model of ``width`` tuned at ``base_width``.

    For a hidden matrix the width is its fan-in: a model whose MLP grows with another factor than d_model asks once for each.

    Raises:
        ValueError: a width is not positive, or the kind unknown.
    """
    for name, value in (("width", width), ("base_width", base_width)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    m = width / base_width
    if kind in ("input", "vector"):
        return Scaling(lr=1.0, init_std=1.0, output=1.0, weight_decay=1.0)
    if kind == "hidden":
        return Scaling(lr=1 / m, init_std=1 / math.sqrt(m), output=1.0, weight_decay=m)
    if kind == "output":
        return Scaling(lr=1.0, init_std=1.0, output=1 / m, weight_decay=1.0)
    raise ValueError(f"kind must be input, vector, hidden or output, got {kind!r}")


def attention_scale(head_dim: int, base_head_dim: float) -> float:
    """Factor on query times key: 1 / head_dim, scaled to be the usual 1 / sqrt(head_dim) at the base width.

    base_head_dim: may be a fraction, where as many heads share a base width that they do not divide: it only sets a constant.
    """
    if head_dim < 1 or not base_head_dim > 0:
        raise ValueError(f"head_dim must be at least 1 and base_head_dim above 0, got {head_dim} and {base_head_dim}")
    # In this order the second factor is exactly 1 at the base width, where the first is what a model without muP uses.
    return math.pow(head_dim, -0.5) * math.sqrt(base_head_dim / head_dim)


def parameter_kind(name: str, shape: tuple[int, ...]) -> Kind:
    """The kind of a parameter of ``planning.count.parameter_shapes``, by its logical name.

    A tied embedding is an input; its use as the head still takes the output multiplier of ``scaling("output", ...)``. A router is an
    output: its fan-out, the experts, does not grow.
    """
    if len(shape) < 2:
        return "vector"
    if name in ("embedding.weight", "positions.weight"):
        return "input"
    return "output" if name == "head.weight" or name.endswith("router.weight") else "hidden"


def parameter_scaling(name: str, shape: tuple[int, ...], model: ModelConfig) -> Scaling:
    """Factors of the parameter ``name`` of ``model``; all 1 without ``mup_base_width``."""
    base = model.d_model if model.mup_base_width is None else model.mup_base_width
    return scaling(parameter_kind(name, shape), model.d_model, base)


def output_multiplier(model: ModelConfig) -> float:
    """Factor on the hidden states that the head turns into logits, tied or not; 1 without ``mup_base_width``."""
    base = model.d_model if model.mup_base_width is None else model.mup_base_width
    return scaling("output", model.d_model, base).output


def score_scale(model: ModelConfig) -> float:
    """Factor on query times key in ``model``: 1 / sqrt(head size) without ``mup_base_width``."""
    return attention_scale(model.head_size, model.mup_base_head_size)
