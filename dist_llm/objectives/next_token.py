"""Next-token cross-entropy, as a sum: whoever calls knows by how many tokens of the global batch to divide."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dist_llm.kernels.cross_entropy.reference import CrossEntropyFn, cross_entropy_reference

__all__ = ["next_token_nll"]


def next_token_nll(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore: int,
    cross_entropy: CrossEntropyFn = cross_entropy_reference,
) -> torch.Tensor:
    """Sum of -log p(target) in nats over the valid targets.

    Args:
        hidden: (B, T, D) in the compute dtype.
        head_weight: (V, D).
        targets: (B, T) int64; ``ignore`` marks targets that do not count.
        ignore: that mark.
        cross_entropy: takes the logits in the compute dtype, and computes in fp32: in bf16 the log-probabilities themselves
            would carry only 8 bits.

    Returns:
        scalar float32.
    """
    logits = F.linear(hidden.flatten(0, 1), head_weight.to(hidden.dtype))
    return cross_entropy(logits, targets.flatten(), ignore=ignore)
