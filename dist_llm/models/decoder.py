"""Pre-norm decoder: tokens in, hidden states out.

The output head is a weight, not a layer, so that the objective decides how logits are made (or whether, with fused linear and
cross-entropy, they are made at all).

B batch, T tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_llm.config.schema import ModelConfig
from dist_llm.layers.attention import KeyValueCache
from dist_llm.layers.linear import Embedding
from dist_llm.layers.rotary import rotary_table
from dist_llm.models.block import Block, Ops, build_norm
from dist_llm.models.init import initial_tensor, std_of

__all__ = ["Decoder", "new_cache"]


class Decoder(nn.Module):
    """Decoder-only transformer described by a ``ModelConfig``.

    Parameters are created empty: ``initial_weights`` or a checkpoint fills them by logical name.
    """

    def __init__(self, config: ModelConfig, ops: Ops, *, compute_dtype: torch.dtype, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.recompute = recompute
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.positions = Embedding(config.max_seq_len, config.d_model) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.num_layers))
        self.final_norm = build_norm(config, ops)
        self.head = None if config.tie_embeddings else Embedding(config.vocab_size, config.d_model)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, D) output matrix: the embedding itself when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        doc_ids: torch.Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: (B, T) int64.
            positions: (B, T) int64, each below max_seq_len.
            doc_ids: (B, T) int32, or None when a row is one text.
            caches: one a layer, when tokens continue a text already seen.

        Returns:
            (B, T, D) in the compute dtype.
        """
        x_BTD = self.embedding(tokens, self.compute_dtype)
        rotary = None
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions, self.compute_dtype)
        else:
            rotary = rotary_table(positions, self.config.head_size, self.config.rope_theta)
        for i, block in enumerate(self.blocks):
            if self.recompute and caches is None and torch.is_grad_enabled():
                # Nothing inside draws random numbers, so there is no generator state to carry to the second pass.
                x_BTD = checkpoint(block, x_BTD, rotary, doc_ids, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD = block(x_BTD, rotary, doc_ids, None if caches is None else caches[i])
        return self.final_norm(x_BTD)

    def initial_weights(self, seed: int) -> dict[str, torch.Tensor]:
        """Initial value of every parameter by logical name, float32."""
        std = self.config.init_std
        layers = self.config.num_layers
        return {
            name: initial_tensor(name, parameter.shape, std=std_of(name, init_std=std, num_layers=layers), seed=seed)
            for name, parameter in self.named_parameters()
        }

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy ``weights`` into the parameters.

        Raises:
            ValueError: names or shapes are not exactly the model's; nothing was copied.
        """
        own = dict(self.named_parameters())
        missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        if missing or unknown:
            raise ValueError(f"weights do not fit the model: missing {missing[:3]}, unknown {unknown[:3]}")
        for name, parameter in own.items():
            if weights[name].shape != parameter.shape:
                raise ValueError(f"{name}: shape {tuple(weights[name].shape)}, the model has {tuple(parameter.shape)}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])


def new_cache(model: Decoder, batch: int, capacity: int) -> list[KeyValueCache]:
    """Empty key-value caches for ``batch`` rows of up to ``capacity`` tokens, one a layer."""
    config = model.config
    shape = (batch, capacity, config.kv_heads, config.head_size)
    device = model.embedding.weight.device
    return [
        KeyValueCache(
            keys=torch.empty(shape, dtype=model.compute_dtype, device=device),
            values=torch.empty(shape, dtype=model.compute_dtype, device=device),
        )
        for _ in range(config.num_layers)
    ]
