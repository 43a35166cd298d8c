"""The one block all models are built from: x + attention(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dist_llm.config.schema import ModelConfig
from dist_llm.layers.attention import KeyValueCache, SelfAttention
from dist_llm.layers.dropout import Dropout
from dist_llm.layers.mlp import GeluMLP, SwigluMLP
from dist_llm.layers.norm import LayerNorm, RMSNorm
from dist_llm.layers.region import WHOLE, TensorRegion
from dist_llm.models.ops import Ops
from dist_llm.planning.mup import score_scale

__all__ = ["Block", "Places", "build_dropout", "build_norm"]


@dataclass(frozen=True)
class Places:
    """Where the tokens of a micro-batch stand: the same for all blocks.

    Attributes:
        rotary: cosine and sine of each position, or None with learned positions.
        doc_ids: (B, T) int32, or None when a row is one text.
        samples: (B,) int64, global sample numbers; dropout is a function of them.
        columns: (T of the residual stream,) int64, index of each token in its row.
    """

    rotary: tuple[torch.Tensor, torch.Tensor] | None
    doc_ids: torch.Tensor | None
    samples: torch.Tensor | None = None
    columns: torch.Tensor | None = None


def build_norm(config: ModelConfig, ops: Ops, region: TensorRegion = WHOLE) -> nn.Module:
    """The normalisation the config names."""
    if config.norm == "rms_norm":
        return RMSNorm(config.d_model, eps=config.norm_eps, fn=ops.rms_norm, residual_fn=ops.rms_norm_residual, region=region)
    return LayerNorm(
        config.d_model, eps=config.norm_eps, bias=config.bias, fn=ops.layer_norm, residual_fn=ops.layer_norm_residual, region=region
    )


def build_dropout(config: ModelConfig, ops: Ops, seed: int, name: str) -> Dropout:
    """Dropout of the residual stream's summand ``name``."""
    return Dropout(config.dropout, seed=seed, name=name, fn=ops.dropout, add_fn=ops.dropout_add)


class Block(nn.Module):
    """Pre-norm transformer block number ``number``.

    Args:
        config: shape.
        ops: implementations of fused ops.
        number: of the block in the whole model, which its dropout depends on.
        seed: of dropout.
        region: tensor-parallel ranks.
        recompute_attention: keep only the inputs of attention for backward.
        joint: query, key and value by one product.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        *,
        number: int = 0,
        seed: int = 0,
        region: TensorRegion = WHOLE,
        recompute_attention: bool = False,
        joint: bool = True,
    ) -> None:
        super().__init__()
        self.attention_norm = build_norm(config, ops, region)
        self.attention = SelfAttention(
            config.d_model,
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_size,
            bias=config.bias,
            fn=ops.attention,
            linear=ops.linear,
            rotate=ops.rotary,
            scale=score_scale(config),
            region=region,
            recompute=recompute_attention,
            window=config.layer_window(number),
            joint=ops.joint_linear if joint else None,
        )
        self.attention_dropout = build_dropout(config, ops, seed, f"blocks.{number}.attention")
        self.mlp_norm = build_norm(config, ops, region)
        if config.activation == "swiglu":
            self.mlp: nn.Module = SwigluMLP(
                config.d_model, config.ffn_size, bias=config.bias, linear=ops.linear, swiglu=ops.swiglu, region=region
            )
        else:
            self.mlp = GeluMLP(config.d_model, config.ffn_size, bias=config.bias, linear=ops.linear, gelu=ops.gelu, region=region)
        self.mlp_dropout = build_dropout(config, ops, seed, f"blocks.{number}.mlp")

    def forward(self, x_BTD: torch.Tensor, places: Places, cache: KeyValueCache | None = None) -> torch.Tensor:
        """x_BTD: (B, T or, under sequence parallelism, T/tp, D) -> the same shape."""
        out_BTD = self.attention(self.attention_norm(x_BTD), rotary=places.rotary, doc_ids=places.doc_ids, cache=cache)
        out_BTD = self.attention_dropout(out_BTD, places.samples, places.columns)
        normed_BTD, x_BTD = self.mlp_norm(out_BTD, x_BTD)
        return self.mlp_dropout(self.mlp(normed_BTD), places.samples, places.columns, residual=x_BTD)
