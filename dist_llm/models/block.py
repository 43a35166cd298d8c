"""The one block all models are built from: x + attention(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dist_llm.config.schema import ModelConfig
from dist_llm.kernels.cross_entropy.reference import CrossEntropyFn, cross_entropy_reference
from dist_llm.layers.attention import AttentionFn, KeyValueCache, SelfAttention
from dist_llm.layers.mlp import GeluMLP, SwigluMLP
from dist_llm.layers.norm import LayerNorm, RMSNorm, RMSNormFn

__all__ = ["Block", "Ops", "build_norm"]


@dataclass(frozen=True)
class Ops:
    """The implementations of fused ops a model and its objective compute with, chosen at start-up."""

    rms_norm: RMSNormFn
    attention: AttentionFn
    cross_entropy: CrossEntropyFn = cross_entropy_reference


def build_norm(config: ModelConfig, ops: Ops) -> nn.Module:
    """The normalisation the config names."""
    if config.norm == "rms_norm":
        return RMSNorm(config.d_model, eps=config.norm_eps, fn=ops.rms_norm)
    return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.attention_norm = build_norm(config, ops)
        self.attention = SelfAttention(
            config.d_model,
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_size,
            bias=config.bias,
            fn=ops.attention,
        )
        self.mlp_norm = build_norm(config, ops)
        mlp = SwigluMLP if config.activation == "swiglu" else GeluMLP
        self.mlp = mlp(config.d_model, config.ffn_size, bias=config.bias)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        doc_ids: torch.Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """x_BTD: (B, T, D) -> (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary=rotary, doc_ids=doc_ids, cache=cache)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))
