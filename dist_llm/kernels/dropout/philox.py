"""Philox 4x32-10 on int64 tensors (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11, section 3.3 and table 2).

A counter-based generator: the four 32-bit outputs are a function of a 128-bit counter and a 64-bit key, with no state between calls,
so any element of a random tensor can be made by itself, on any device, in any order.
"""

from __future__ import annotations

import torch

__all__ = ["Words", "philox_4x32"]

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: what the key grows by each round
_ROUNDS = 10


def philox_4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors of values in [0, 2**32), of shapes that broadcast together. Words that vary along different
            dimensions may be passed unexpanded: the first rounds then work on the small shapes.
        key: two integers in [0, 2**32).

    Returns:
        four int64 tensors of the common shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of the 64-bit product."""
    # The product may pass 2**63: int64 wraps modulo 2**64 (C++ leaves that open for signed numbers, torch's kernels do it), and the
    # masks take the same bits of it as of the unsigned product.
    product = b * a
    return (product >> 32) & _MASK, product & _MASK
