"""Pre-norm decoder, or one pipeline stage of it: tokens or hidden states in, hidden states out.

The output head is a weight, not a layer, so that the objective decides how logits are made (or whether, with fused linear and
cross-entropy, they are made at all).

B batch, T tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_llm.config.schema import ModelConfig
from dist_llm.layers.attention import KeyValueCache
from dist_llm.layers.embedding import Embedding, VocabParallelEmbedding
from dist_llm.layers.region import WHOLE, TensorRegion
from dist_llm.layers.rotary import rotary_table
from dist_llm.models.block import Block, Places, build_dropout, build_norm
from dist_llm.models.init import initial_tensor, std_of
from dist_llm.models.ops import Ops
from dist_llm.planning.count import parameter_shapes
from dist_llm.planning.mup import output_multiplier, parameter_scaling
from dist_llm.planning.shards import tensor_slice

__all__ = ["Decoder", "Recompute", "new_cache"]


@dataclass(frozen=True)
class Recompute:
    """What is computed again in backward, and in how many blocks of a stage, counted from its first."""

    what: Literal["none", "selective", "full"] = "none"
    layers: int | None = None

    def applies(self, what: str, index: int) -> bool:
        """Whether block ``index`` of the stage recomputes ``what``."""
        return self.what == what and (self.layers is None or index < self.layers)


class Decoder(nn.Module):
    """Decoder-only transformer described by a ``ModelConfig``, or the part of it that one rank holds.

    Parameters are created empty: ``initial_weights`` or a checkpoint fills them by logical name.

    Args:
        config: shape of the whole model.
        ops: implementations of fused ops.
        compute_dtype: of activations.
        recompute: what is computed again in backward.
        region: tensor-parallel ranks.
        layers: numbers of the blocks of this stage; default all. The stage with block 0 has the embedding, the one with the last
            block the final norm and the head.
        seed: of dropout.
        joint: projections that share their input are one product; False where a weight exists only while its own layer runs (ZeRO-3).
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        *,
        compute_dtype: torch.dtype,
        recompute: Recompute = Recompute(),
        region: TensorRegion = WHOLE,
        layers: range | None = None,
        seed: int = 0,
        joint: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.recompute = recompute
        self.region = region
        self.layers = layers if layers is not None else range(config.num_layers)
        self.is_first = self.layers.start == 0
        self.is_last = self.layers.stop == config.num_layers
        if self.is_first:
            self.embedding = VocabParallelEmbedding(config.vocab_size, config.d_model, fn=ops.embedding, region=region)
            self.positions = None
            if config.position == "learned":
                self.positions = Embedding(config.max_seq_len, config.d_model, fn=ops.embedding, region=region)
            self.embedding_dropout = build_dropout(config, ops, seed, "embedding")
        # Under their numbers in the whole model, so that names are the same in every layout.
        self.blocks = nn.ModuleDict(
            {
                str(number): Block(
                    config, ops, number=number, seed=seed, region=region, recompute_attention=recompute.applies("selective", i), joint=joint
                )
                for i, number in enumerate(self.layers)
            }
        )
        if self.is_last:
            self.final_norm = build_norm(config, ops, region)
            self.head = None if config.tie_embeddings else VocabParallelEmbedding(config.vocab_size, config.d_model, region=region)
        self.output_multiplier = output_multiplier(config)
        # The last stage of a pipeline borrows a tied head from the first, see parallel/tied_head.py.
        self.borrowed_head: torch.Tensor | None = None

    @property
    def borrows_head(self) -> bool:
        """True for a last stage whose tied embedding is another stage's."""
        return self.is_last and not self.is_first and self.config.tie_embeddings

    @property
    def head_weight(self) -> torch.Tensor:
        """(rows of this rank, D) output matrix: the embedding itself when tied."""
        assert self.is_last, "only the last stage has a head"
        if self.head is not None:
            return self.head.weight
        if self.borrows_head:
            assert self.borrowed_head is not None, "the tied head has not arrived from the first stage"
            return self.borrowed_head
        return self.embedding.weight

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        doc_ids: torch.Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
        *,
        samples: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states, on the last stage after the final norm and times the output multiplier of muP: the head takes them as they are.

        Args:
            tokens: (B, T) int64.
            positions: (B, T) int64, each below max_seq_len.
            doc_ids: (B, T) int32, or None when a row is one text.
            caches: one a layer, when tokens continue a text already seen.
            samples: (B,) int64 global sample numbers; needed when the model has dropout.
            columns: (T,) int64 index of each token in its row; needed when the model has dropout.
            hidden: (B, T or T/tp, D) from the stage before; None on the first stage.

        Returns:
            (B, T or, under sequence parallelism, T/tp, D) in the compute dtype.
        """
        region = self.region
        own_columns = None if columns is None else region.own_tokens(columns, 0)
        if self.is_first:
            x_BTD = self.embedding(tokens, self.compute_dtype)
            if self.positions is not None:
                x_BTD = x_BTD + self.positions(region.own_tokens(positions, 1), self.compute_dtype)
            x_BTD = self.embedding_dropout(x_BTD, samples, own_columns)
        else:
            assert hidden is not None, "a later stage computes from hidden states"
            x_BTD = hidden
        rotary = rotary_table(positions, self.config.head_size, self.config.rope_theta) if self.config.position == "rotary" else None
        places = Places(rotary, doc_ids, samples, own_columns)
        for i, block in enumerate(self.blocks.values()):
            if caches is None and self.recompute.applies("full", i) and torch.is_grad_enabled():
                # Nothing inside draws from a generator, so there is no state to carry to the second pass.
                x_BTD = checkpoint(block, x_BTD, places, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD = block(x_BTD, places, None if caches is None else caches[i])
        if not self.is_last:
            return x_BTD
        x_BTD = self.final_norm(x_BTD)
        # On the hidden states rather than the logits: fewer numbers, and every head (objective, generation) gets them alike.
        return x_BTD if self.output_multiplier == 1 else x_BTD * self.output_multiplier

    def initial_weights(self, seed: int) -> dict[str, torch.Tensor]:
        """Initial value of every parameter this rank holds, by logical name, float32."""
        std, layers = self.config.init_std, self.config.num_layers
        shapes = parameter_shapes(self.config)

        def initial(name: str) -> torch.Tensor:
            factor = parameter_scaling(name, shapes[name], self.config).init_std
            std_here = std_of(name, init_std=std, num_layers=layers, width_factor=factor)
            return self.own_part(name, initial_tensor(name, torch.Size(shapes[name]), std=std_here, seed=seed))

        return {name: initial(name) for name, _ in self.named_parameters()}

    def own_part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What this rank holds of the logical tensor ``name``."""
        part = tensor_slice(name, self.config, self.region.tp.size, self.region.tp.rank)
        return whole if part is None else whole.narrow(part.dim, part.start, part.stop - part.start)

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy ``weights``, this rank's parts, into the parameters.

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
