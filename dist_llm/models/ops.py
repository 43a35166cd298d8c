"""The implementations of fused ops that a model computes with, chosen at start-up and handed to its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from dist_llm.kernels.cross_entropy.reference import CrossEntropyFn, cross_entropy_reference
from dist_llm.kernels.dropout.reference import dropout_reference
from dist_llm.kernels.impl import Impl
from dist_llm.kernels.linear.reference import linear_reference
from dist_llm.layers.attention import AttentionFn
from dist_llm.layers.dropout import DropoutFn
from dist_llm.layers.linear import LinearFn
from dist_llm.layers.norm import RMSNormFn

__all__ = ["Ops"]


@dataclass(frozen=True)
class Ops:
    """One function for each op; those left out are the definitions in plain PyTorch."""

    rms_norm: RMSNormFn
    attention: AttentionFn
    cross_entropy: CrossEntropyFn = cross_entropy_reference
    dropout: DropoutFn = dropout_reference
    linear: LinearFn = linear_reference

    @classmethod
    def of(cls, chosen: Mapping[str, Impl], **others: Callable[..., Any]) -> Ops:
        """From what ``kernels.table.choices`` chose; ``others`` replace an op, such as attention over several ranks."""
        return cls(**{field.name: others.get(field.name, chosen[field.name].fn) for field in fields(cls)})
