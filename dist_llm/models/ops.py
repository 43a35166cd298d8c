"""The implementations of fused ops that a model computes with, chosen at start-up and handed to its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from dist_llm.kernels.activation.reference import gelu_reference, swiglu_reference
from dist_llm.kernels.attention.reference import attention_reference
from dist_llm.kernels.cross_entropy.reference import CrossEntropyFn, cross_entropy_reference
from dist_llm.kernels.dropout.reference import dropout_add_reference, dropout_reference
from dist_llm.kernels.embedding.reference import embedding_reference
from dist_llm.kernels.impl import Impl
from dist_llm.kernels.layer_norm.reference import layer_norm_reference, layer_norm_residual_reference
from dist_llm.kernels.linear.reference import joint_linear_reference, linear_reference
from dist_llm.kernels.rms_norm.reference import rms_norm_reference, rms_norm_residual_reference
from dist_llm.kernels.rotary.reference import rotary_reference
from dist_llm.layers.attention import AttentionFn
from dist_llm.layers.dropout import DropoutAddFn, DropoutFn
from dist_llm.layers.embedding import EmbeddingFn
from dist_llm.layers.linear import ActivationFn, JointLinearFn, LinearFn
from dist_llm.layers.mlp import SwigluFn
from dist_llm.layers.norm import LayerNormFn, LayerNormResidualFn, RMSNormFn, RMSNormResidualFn
from dist_llm.layers.rotary import RotaryFn

__all__ = ["Ops"]


@dataclass(frozen=True)
class Ops:
    """One function for each op, under the names of ``kernels.table.TABLES``; those left out are the definitions in plain PyTorch."""

    attention: AttentionFn = attention_reference
    cross_entropy: CrossEntropyFn = cross_entropy_reference
    dropout: DropoutFn = dropout_reference
    dropout_add: DropoutAddFn = dropout_add_reference
    embedding: EmbeddingFn = embedding_reference
    gelu: ActivationFn = gelu_reference
    joint_linear: JointLinearFn = joint_linear_reference
    layer_norm: LayerNormFn = layer_norm_reference
    layer_norm_residual: LayerNormResidualFn = layer_norm_residual_reference
    linear: LinearFn = linear_reference
    rms_norm: RMSNormFn = rms_norm_reference
    rms_norm_residual: RMSNormResidualFn = rms_norm_residual_reference
    rotary: RotaryFn = rotary_reference
    swiglu: SwigluFn = swiglu_reference

    @classmethod
    def of(cls, chosen: Mapping[str, Impl], **others: Callable[..., Any]) -> Ops:
        """From what ``kernels.table.choices`` chose; ``others`` replace an op, such as attention over several ranks."""
        return cls(**{field.name: others.get(field.name, chosen[field.name].fn) for field in fields(cls)})
