"""Parameters and FLOPs of a model from its config, to the unit.

Per block, with D = d_model, N query heads, K key and value heads, H head dim, F = ffn width:
attention D*(N + 2K)*H + N*H*D weights, MLP 2*D*F (gelu) or 3*D*F (swiglu), two norms of D each, and biases where they are on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_llm.config.schema import ModelConfig
from dist_llm.planning.shapes import attended

__all__ = ["ParamCount", "count_params", "flops_per_token", "parameter_shapes"]


@dataclass(frozen=True)
class ParamCount:
    """Number of parameters, by what they are."""

    total: int
    embedding: int  # token embedding, learned positions, and the head when it is a matrix of its own

    @property
    def non_embedding(self) -> int:
        """Blocks and norms."""
        return self.total - self.embedding


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Logical name and shape of every parameter, in the model's order."""
    d, h, ffn = model.d_model, model.head_size, model.ffn_size
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (model.vocab_size, d)}
    if model.position == "learned":
        shapes["positions.weight"] = (model.max_seq_len, d)

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if model.bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (d,)
        if model.norm == "layer_norm" and model.bias:
            shapes[f"{name}.bias"] = (d,)

    for i in range(model.num_layers):
        block = f"blocks.{i}"
        norm(f"{block}.attention_norm")
        linear(f"{block}.attention.query", d, model.num_heads * h)
        linear(f"{block}.attention.key", d, model.kv_heads * h)
        linear(f"{block}.attention.value", d, model.kv_heads * h)
        linear(f"{block}.attention.output", model.num_heads * h, d)
        norm(f"{block}.mlp_norm")
        if model.activation == "swiglu":
            linear(f"{block}.mlp.gate", d, ffn)
        linear(f"{block}.mlp.up", d, ffn)
        linear(f"{block}.mlp.down", ffn, d)
    norm("final_norm")
    if not model.tie_embeddings:
        shapes["head.weight"] = (model.vocab_size, d)
    return shapes


def count_params(model: ModelConfig) -> ParamCount:
    """Parameters of ``model``; a tied head counts once."""
    shapes = parameter_shapes(model)
    tables = ("embedding.weight", "positions.weight", "head.weight")
    return ParamCount(
        total=sum(math.prod(shape) for shape in shapes.values()),
        embedding=sum(math.prod(shapes[name]) for name in tables if name in shapes),
    )


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Training FLOPs per token, forward and backward, two per multiply-add; the backward is twice the forward.

    6 x the weights that take part in matrix products (the head does, a look-up does not), and attention's two products of
    T x T per head over the causal half: 6 * L * N * H * T (Narayanan et al., arXiv:2104.04473, appendix; halved for the
    causal mask, as the work is really done by kernels that skip it; with a window, what lies before it is skipped too).
    """
    shapes = parameter_shapes(model)
    matrices = sum(math.prod(s) for name, s in shapes.items() if len(s) == 2 and name.startswith("blocks."))
    head = model.vocab_size * model.d_model
    attention = model.num_heads * model.head_size * sum(attended(model.layer_window(layer), seq_len) for layer in range(model.num_layers))
    return 6.0 * (matrices + head) + 6.0 * attention
