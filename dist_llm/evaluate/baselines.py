"""What a language model's bits per byte are held against: figures of the same bytes that need no model."""

from __future__ import annotations

import lzma

import numpy as np

__all__ = ["byte_unigram_entropy", "lzma_bits_per_byte"]


def byte_unigram_entropy(data: bytes) -> float:
    """Entropy of the byte frequencies of ``data`` itself, in bits per byte: the best any order-0 code could do."""
    if not data:
        raise ValueError("entropy of no bytes")
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    shares = counts[counts > 0] / len(data)
    return float(-(shares * np.log2(shares)).sum())


def lzma_bits_per_byte(data: bytes) -> float:
    """Size of ``data`` compressed by ``lzma`` at preset 9 (``xz -9``), in bits per byte of ``data``."""
    if not data:
        raise ValueError("compression of no bytes")
    return 8 * len(lzma.compress(data, preset=9)) / len(data)
