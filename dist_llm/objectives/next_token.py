"""Next-token cross-entropy, as a sum: whoever calls knows by how many tokens of the global batch to divide."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["next_token_nll"]


def next_token_nll(hidden: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor, *, ignore: int) -> torch.Tensor:
    """Sum of -log p(target) in nats over the valid targets.

    Args:
        hidden: (B, T, D) in the compute dtype.
        head_weight: (V, D).
        targets: (B, T) int64; ``ignore`` marks targets that do not count.
        ignore: that mark.

    Returns:
        scalar float32.
    """
    logits = F.linear(hidden.flatten(0, 1), head_weight.to(hidden.dtype))
    # Softmax in fp32: in bf16 the log-probabilities themselves would carry only 8 bits.
    return F.cross_entropy(logits.float(), targets.flatten(), ignore_index=ignore, reduction="sum")
