"""Tiny models of every kind, filled with weights."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from dist_llm.config.schema import ModelConfig
from dist_llm.data.rows import IGNORE
from dist_llm.kernels.attention.reference import attention_reference
from dist_llm.kernels.attention.sdpa import attention_sdpa
from dist_llm.kernels.rms_norm.reference import rms_norm_reference
from dist_llm.models.decoder import Decoder, Recompute
from dist_llm.models.ops import Ops
from dist_llm.objectives.next_token import next_token_nll

REFERENCE = Ops(rms_norm=rms_norm_reference, attention=attention_reference)
FUSED = Ops(rms_norm=rms_norm_reference, attention=attention_sdpa)

# Every choice a ModelConfig has that changes what is built: 2 * 2 * 2 * 3 * 2 * 2 models.
CHOICES: dict[str, tuple[Any, ...]] = {
    "norm": ("rms_norm", "layer_norm"),
    "position": ("rotary", "learned"),
    "activation": ("swiglu", "gelu"),
    "num_kv_heads": (None, 2, 1),  # multi-head, grouped-query, multi-query
    "bias": (False, True),
    "tie_embeddings": (False, True),
}
ALL_KINDS = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]


def make_config(**changes: Any) -> ModelConfig:
    """A model of two layers with odd sizes, but for what ``changes`` says."""
    sizes = {"vocab_size": 37, "d_model": 24, "num_layers": 2, "num_heads": 4, "ffn_dim": 20, "max_seq_len": 19}
    return ModelConfig(**{**sizes, **changes})


def make_model(config: ModelConfig, *, dtype: torch.dtype = torch.float32, ops: Ops = FUSED, recompute: bool = False) -> Decoder:
    """A model whose biases and gains are random, too: as initialised they are zero and one, and would hide mistakes."""
    model = Decoder(config, ops, compute_dtype=dtype, recompute=Recompute("full" if recompute else "none"))
    weights = model.initial_weights(seed=3)
    generator = torch.Generator().manual_seed(5)
    # Larger than at the start of a run, so that attention is far from uniform.
    model.load_weights({name: 5 * w + 0.1 * torch.randn(w.shape, generator=generator) if w.ndim == 2 else w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in weights.items()})  # fmt: skip
    return model


def make_batch(config: ModelConfig, *, batch: int = 2, length: int = 13, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random tokens, targets (some ignored) and positions, (batch, length) each."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, config.vocab_size, (2, batch, length), generator=generator)
    targets[:, ::5] = IGNORE
    return tokens, targets, torch.arange(length).expand(batch, length)


def loss_and_grads(
    model: Decoder, tokens: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, doc_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor | None]]:
    """Hidden states, summed loss, and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    hidden = model(tokens, positions, doc_ids)
    loss = next_token_nll(hidden, model.head_weight, targets, ignore=IGNORE)
    loss.backward()
    return hidden.detach(), loss.detach(), {name: p.grad for name, p in model.named_parameters()}
