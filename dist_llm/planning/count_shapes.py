"""Parameters, FLOPs and bytes of any ``ModelShape``, dense or of experts, to the unit.

Per layer, with D = d_model, N query heads, K key and value heads, H head dim, F = MLP width: attention 2 D H (N + K) weights, MLP 2 D F
or, gated, 3 D F; a layer of experts has E of the latter at their own width, the shared ones besides, and a router of D E. Two norms of
D. Biases, where they are on, stand on every linear layer except router and head, and in layer norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_llm.planning.shapes import ModelShape

__all__ = [
    "Flops",
    "Recompute",
    "ShapeCount",
    "checkpoint_bytes_of",
    "export_bytes",
    "flops_of_token",
    "shape_params",
    "token_bytes",
    "training_flops",
]

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ShapeCount:
    """Number of parameters.

    total: all. active: those a token meets, embeddings included, experts not chosen left out. embedding: token embedding, learned
    positions, and the head where it is a matrix of its own.
    """

    total: int
    active: int
    embedding: int

    @property
    def non_embedding(self) -> int:
        """What Kaplan et al. (arXiv:2001.08361) count, of a dense model: blocks and norms."""
        return self.total - self.embedding


def shape_params(shape: ModelShape) -> ShapeCount:
    """Parameters of ``shape``; a tied head counts once."""
    d = shape.d_model
    norm = 2 * d if shape.norm == "layer_norm" and shape.bias else d
    attention = shape.attention_weights
    if shape.bias:
        attention += (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim + d
    dense_mlp = shape.mlp_weights + _mlp_biases(shape, shape.ffn_dim)
    expert = shape.expert_weights + _mlp_biases(shape, shape.expert_ffn)
    moe_layers, dense_layers = shape.moe_layers, shape.num_layers - shape.moe_layers
    shared = shape.num_layers * (attention + 2 * norm) + dense_layers * dense_mlp + norm
    shared += moe_layers * (shape.router_weights + shape.shared_experts * expert)
    embedding = shape.vocab_size * d + shape.learned_positions * d + (0 if shape.tied else shape.head_weights)
    return ShapeCount(
        total=shared + embedding + moe_layers * shape.num_experts * expert,
        active=shared + embedding + moe_layers * shape.experts_per_token * expert,
        embedding=embedding,
    )


def _mlp_biases(shape: ModelShape, ffn: int) -> int:
    return ((2 if shape.gated else 1) * ffn + shape.d_model) if shape.bias else 0


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token in training, two per multiply-add.

    weights: products with matrices, forward and backward. attention: scores and their sum over values, forward and backward.
    recompute: forward work done again in the backward pass, which a model's FLOPs (MFU) leave out and the hardware's (HFU) count.
    """

    weights: float
    attention: float
    recompute: float

    @property
    def model(self) -> float:
        """Without what is computed twice."""
        return self.weights + self.attention

    @property
    def hardware(self) -> float:
        """All that is computed."""
        return self.model + self.recompute


def flops_of_token(shape: ModelShape, *, recompute: Recompute = "none", causal: bool = True) -> Flops:
    """Exact count of the matrix products; element-wise work is left out, and a look-up costs nothing.

    The backward pass of a product is two of its size. Attention has two products of head_dim for each of the keys a query sees: T of them,
    or with kernels that skip the masked half T/2 (``causal``); with a window as many fewer as ``shapes.attended`` says. Selective recomputation repeats attention's two products, full
    recomputation the whole block except that the head is never repeated (Korthikanti et al., arXiv:2205.05198, sections 5 and A).

    Narayanan et al. (arXiv:2104.04473, appendix) count the same with ``causal=False``: with full recomputation, F = 4D and heads as wide
    as the model it is their 96 B s l h^2 (1 + s/6h + V/16lh), up to the head, which they repeat no more than we do.
    """
    moe, dense = shape.moe_layers, shape.num_layers - shape.moe_layers
    experts = shape.experts_per_token + shape.shared_experts
    matrices = shape.num_layers * shape.attention_weights + dense * shape.mlp_weights
    matrices += moe * (shape.router_weights + experts * shape.expert_weights)
    keys = shape.attended_tokens / 2 if causal else shape.attended_tokens  # of all layers
    scores = 4.0 * shape.num_heads * shape.head_dim * keys  # forward: two products, two FLOPs
    again = {"none": 0.0, "selective": scores, "full": 2.0 * matrices + scores}[recompute]
    return Flops(weights=6.0 * (matrices + shape.head_weights), attention=3.0 * scores, recompute=again)


def training_flops(active_params: float, tokens: float) -> float:
    """6 N D (Kaplan et al., arXiv:2001.08361, section 2.1): the weights' share, in which laws and published tables count."""
    return 6.0 * active_params * tokens


def checkpoint_bytes_of(params: int) -> int:
    """A checkpoint of ours: fp32 master weights and two moments of AdamW, 12 bytes a parameter."""
    return 12 * params


def export_bytes(params: int, *, bytes_per_param: int = 2) -> int:
    """Weights alone, in bf16 as they are handed on; without the few kilobytes of a file's header."""
    return bytes_per_param * params


def token_bytes(tokens: int, vocab_size: int) -> int:
    """A corpus of ``tokens`` as numbers: two bytes each up to a vocabulary of 65,536, four beyond."""
    return tokens * (2 if vocab_size <= 2**16 else 4)
