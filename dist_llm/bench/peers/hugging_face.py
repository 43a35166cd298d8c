"""Hugging Face's GPT-2 of the same shape and with the same weights: a peer of ``bench step``. transformers is optional."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from dist_llm.bench.peers.gpt import peer_tensors
from dist_llm.config.schema import ModelConfig

__all__ = ["HuggingFaceGPT", "why_not_hugging_face"]


def why_not_hugging_face() -> str | None:
    """Why this peer cannot take part, or None."""
    return None if importlib.util.find_spec("transformers") else "transformers is not installed (pip install transformers)"


class HuggingFaceGPT(nn.Module):
    """Tokens to logits, as ``PlainGPT``."""

    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel  # seconds to import, and only this race needs it

        self.gpt: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size, n_positions=config.max_seq_len, n_embd=config.d_model, n_layer=config.num_layers,
                n_head=config.num_heads, n_inner=config.ffn_size, activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0,
                attn_pdrop=0.0, layer_norm_epsilon=config.norm_eps, use_cache=False,
                bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
        self.gpt.load_state_dict(_renamed(peer_tensors(weights, config.num_layers), config.num_layers), strict=False)
        self.gpt.tie_weights()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 -> (B, T, V)."""
        logits: torch.Tensor = self.gpt(input_ids=tokens).logits
        return logits


def _renamed(peer: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    theirs = {"transformer.wte.weight": peer["embedding.weight"], "transformer.wpe.weight": peer["positions.weight"]}
    modules = {"norm1": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj", "norm2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    for kind in ("weight", "bias"):
        theirs[f"transformer.ln_f.{kind}"] = peer[f"norm.{kind}"]
        for i in range(num_layers):
            for mine, name in modules.items():
                value = peer[f"blocks.{i}.{mine}.{kind}"]
                # GPT-2's projections are stored (inputs, outputs).
                theirs[f"transformer.h.{i}.{name}.{kind}"] = value.t().contiguous() if value.ndim == 2 else value
    return theirs
