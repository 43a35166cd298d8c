"""Which layers each pipeline stage gets, by what they cost."""

from __future__ import annotations

from dist_llm.config.schema import ModelConfig
from dist_llm.planning.count import attended_tokens, parameter_shapes
from dist_llm.topology.stages import cut_stages

__all__ = ["stage_layers"]


def stage_layers(model: ModelConfig, seq_len: int, num_stages: int) -> tuple[range, ...]:
    """Numbers of the blocks of each stage, so that the dearest stage is as cheap as can be.

    Cost is matrix multiply-adds per token; the head counts on the last stage, a look-up on the first costs nothing.

    Args:
        model: the whole model.
        seq_len: tokens in a row.
        num_stages: pipeline ranks times stages a rank holds.

    Raises:
        ValueError: more stages than layers.
    """
    shapes = parameter_shapes(model)
    block = sum(shape[0] * shape[1] for name, shape in shapes.items() if name.startswith("blocks.0.") and len(shape) == 2)
    # Scores and weighted sum over the causal half of the row: 2 x T/2 multiply-adds a head dimension, fewer with a window.
    attention = [model.num_heads * model.head_size * attended_tokens(model, layer, seq_len) for layer in range(model.num_layers)]
    head = model.vocab_size * model.d_model
    return cut_stages([float(block + layer) for layer in attention], num_stages, last=float(head))
