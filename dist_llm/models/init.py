"""Initial weights as a function of seed, logical name and element.

Never of a rank, a device or the order of construction: a slice of a tensor can be initialised by itself, so every layout
starts from the same numbers. Each element owns one 64-bit output of a counter-based generator (Philox 4x64, Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC11) keyed by a hash of seed and name; the uniform made of its upper 52 bits
becomes a normal through the inverse of the normal distribution.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

__all__ = ["initial_slice", "initial_tensor", "std_of"]


def initial_slice(name: str, start: int, stop: int, *, std: float, seed: int) -> torch.Tensor:
    """Elements ``start:stop`` of the flattened tensor ``name``, normal with standard deviation ``std``.

    Returns:
        (stop - start,) float32.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))
    # One Philox step makes four outputs: jump to the step that holds `start`, drop what comes before it.
    generator.advance(start // 4)
    skip = start % 4
    raw = generator.random_raw(skip + stop - start)[skip:]
    # 52 bits and a half, not 53: then the sum is exact, symmetric around 1/2 and never rounds to 1, whose normal is infinite.
    uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    normal = torch.erfinv(torch.from_numpy(2.0 * uniform - 1.0)) * (std * math.sqrt(2.0))
    return normal.to(torch.float32)


def initial_tensor(name: str, shape: torch.Size, *, std: float, seed: int) -> torch.Tensor:
    """The whole tensor ``name``, float32: biases zero, gains of norms one, matrices normal with deviation ``std``."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)  # the gain of a norm
    return initial_slice(name, 0, math.prod(shape), std=std, seed=seed).view(shape)


def std_of(name: str, *, init_std: float, num_layers: int, width_factor: float = 1.0) -> float:
    """Standard deviation for the tensor ``name``.

    Projections that write into the residual stream are divided by sqrt(2 num_layers), the number of such writes, so that
    the stream's variance does not grow with depth (GPT-2, Radford et al. 2019, section 2.3).

    width_factor: what muP multiplies the deviation by, see ``planning.mup``.
    """
    writes_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
    return (init_std / math.sqrt(2 * num_layers) if writes_residual else init_std) * width_factor
