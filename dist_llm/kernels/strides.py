"""How the arguments of compiled kernels lie in memory."""

from __future__ import annotations

import torch

__all__ = ["contiguous", "last_dim_contiguous"]


def contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    """``t``, copied when it is not contiguous; None stays None."""
    return None if t is None else t.contiguous()


def last_dim_contiguous(t: torch.Tensor) -> torch.Tensor:
    """``t``, copied only when elements of its last dimension are not neighbours: slices of a cache or of a fused projection are read in place."""
    return t if t.stride(-1) == 1 else t.contiguous()
