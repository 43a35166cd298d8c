"""Names of the races of single kernels. No torch here: `--help` reads it."""

from __future__ import annotations

__all__ = ["KERNEL_CASES"]

# Name of the case -> what it is, for --help. The races are in the module of the same name.
KERNEL_CASES = {
    "rms_norm": "RMSNorm forward and backward",
    "layer_norm": "LayerNorm forward and backward",
    "attention": "causal attention forward and backward",
    "attention_window": "sliding window and packed documents against attention with a mask tensor",
    "cross_entropy": "softmax cross-entropy forward and backward",
    "linear": "linear layers and the gradients of their weights",
    "linear_cross_entropy": "output layer and cross-entropy without all logits",
    "activation": "gelu with bias, and swiglu",
    "dropout": "dropout by logical position",
    "rotary": "rotary positions",
    "embedding": "embedding, and its backward",
    "moe_permute": "routing of tokens to experts and back",
    "moe_mlp": "MLPs of many experts over ragged groups",
    "adamw": "clipping, AdamW and cast",
}
