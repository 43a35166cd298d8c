"""Random models small enough to enumerate."""

from __future__ import annotations

import torch

from dist_llm.config.schema import ModelConfig
from dist_llm.kernels.table import choices
from dist_llm.models.decoder import Decoder
from dist_llm.models.ops import Ops

SHAPES = {
    "rotary": {"position": "rotary"},
    "learned": {"position": "learned", "norm": "layer_norm", "activation": "gelu", "bias": True, "tie_embeddings": True},
    "grouped": {"num_kv_heads": 2},
    "multi_query": {"num_kv_heads": 1},
}


def tiny_model(*, dtype: torch.dtype = torch.float32, seed: int = 7, gain: float = 3.0, **overrides: object) -> Decoder:
    """A decoder with random weights, those of the head times ``gain``: more makes its predictions more certain.

    The head is its own matrix: tied, a random model repeats the last token for ever.
    """
    values = {
        "vocab_size": 31,
        "d_model": 24,
        "num_layers": 2,
        "num_heads": 4,
        "head_dim": 6,
        "max_seq_len": 24,
        "tie_embeddings": False,
        "init_std": 0.2,
    }
    config = ModelConfig.model_validate({**values, **overrides})
    chosen = choices(torch.device("cpu"), dtype, {})
    model = Decoder(config, Ops.of(chosen), compute_dtype=dtype)
    weights = model.initial_weights(seed)
    head = "embedding.weight" if config.tie_embeddings else "head.weight"
    model.load_weights({name: value * gain if name == head else value for name, value in weights.items()})
    return model.to(dtype).eval()
