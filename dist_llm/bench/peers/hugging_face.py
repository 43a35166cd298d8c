"""Hugging Face's GPT-2 of the same shape and with the same weights: a peer of ``bench step``. transformers is optional."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from dist_llm.bench.peers.gpt import PeerModel, peer_tensors
from dist_llm.config.schema import ModelConfig

__all__ = ["HuggingFaceGPT", "why_not_hugging_face"]


def why_not_hugging_face() -> str | None:
    """Why this peer cannot take part, or None."""
    return None if importlib.util.find_spec("transformers") else "transformers is not installed (pip install transformers)"


class HuggingFaceGPT(PeerModel):
    """Tokens to logits, as ``PlainGPT``.

    Raises:
        RuntimeError: this transformers has weights that ours do not fill, or lacks some of ours.
    """

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
        self.num_layers = config.num_layers
        peer = peer_tensors(weights, config.num_layers)
        named = {theirs: peer[mine].t().contiguous() if turned else peer[mine] for mine, theirs, turned in _names(self.num_layers)}
        # The head is tied to the embedding; masks of attention are buffers in some versions.
        missing, unexpected = self.gpt.load_state_dict(named, strict=False)
        missing = set(missing) - {"lm_head.weight", *(name for name, _ in self.gpt.named_buffers())}
        if missing or unexpected:
            raise RuntimeError(
                f"Hugging Face's GPT-2 has other weights than ours: missing {sorted(missing)}, unexpected {sorted(unexpected)}"
            )
        self.gpt.tie_weights()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 -> (B, T, V)."""
        logits: torch.Tensor = self.gpt(input_ids=tokens).logits
        return logits

    def as_plain(self, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors under Hugging Face's names under those of ``PlainGPT``."""
        return {mine: named[f"gpt.{theirs}"].t() if turned else named[f"gpt.{theirs}"] for mine, theirs, turned in _names(self.num_layers)}


def _names(num_layers: int) -> Iterator[tuple[str, str, bool]]:
    """Name in ``PlainGPT``, name in Hugging Face's, and whether it is stored the other way round: GPT-2's projections are (inputs, outputs)."""
    yield "embedding.weight", "transformer.wte.weight", False
    yield "positions.weight", "transformer.wpe.weight", False
    norms = {"norm1": "ln_1", "norm2": "ln_2"}
    projections = {"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    for kind in ("weight", "bias"):
        yield f"norm.{kind}", f"transformer.ln_f.{kind}", False
        for i in range(num_layers):
            for mine, theirs in {**norms, **projections}.items():
                yield f"blocks.{i}.{mine}.{kind}", f"transformer.h.{i}.{theirs}.{kind}", mine in projections and kind == "weight"
