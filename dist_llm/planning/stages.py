"""Which layers each pipeline stage gets, by what they cost."""

from __future__ import annotations

from dist_llm.config.schema import ModelConfig
from dist_llm.planning.shapes import from_config
from dist_llm.planning.stage_tensors import layer_ranges

__all__ = ["stage_layers"]


def stage_layers(model: ModelConfig, seq_len: int, num_stages: int) -> tuple[range, ...]:
    """Numbers of the blocks of each stage, so that the dearest stage is as cheap as can be.

    Args:
        model: the whole model.
        seq_len: tokens in a row.
        num_stages: pipeline ranks times stages a rank holds.

    Raises:
        ValueError: more stages than layers.
    """
    return layer_ranges(from_config(model, seq_len), num_stages)
