"""Dropout in plain PyTorch: the definition (Srivastava et al., JMLR 15, 2014; scaled at training time).

Whether an element is kept is a function of the seed, the site in the model, the sample, the token's column in its row and the
feature. No rank, batch split or order of calls enters, and the mask of any part can be made by itself: layouts agree, and
recomputation in backward needs no saved state.
"""

from __future__ import annotations

import hashlib
import operator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dist_llm.kernels.dropout.philox import philox_4x32

__all__ = ["check_dropout", "check_dropout_add", "dropout_add_reference", "dropout_reference", "keep_mask", "mask_key", "site_number"]

_MASK = 0xFFFFFFFF
_WORDS = 4  # outputs of one counter: that many neighbouring features share it


def site_number(name: str) -> int:
    """Number of a place where dropout acts, from its logical name: the same in every process, layout and release; below 2**63."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def dropout_reference(
    x: torch.Tensor,
    p: float,
    *,
    seed: int,
    site: int,
    samples: torch.Tensor,
    columns: torch.Tensor,
    feature_start: int = 0,
) -> torch.Tensor:
    """Zero each element with probability ``p``, scale the others by 1 / (1 - p).

    Args:
        x: (B, T, D), the features ``feature_start:feature_start + D`` of some tokens.
        p: probability of a zero, in [0, 1). With 0 the answer is ``x`` itself.
        seed: of the run.
        site: from ``site_number``.
        samples: (B,) int64, global number of the sample in each row, at least 0.
        columns: (T,) int64, index of each token in its row, in [0, 2**32).
        feature_start: of this part, when features are divided over ranks.

    Returns:
        (B, T, D), dtype of x. Backward makes the mask again instead of keeping it.

    Raises:
        ValueError: p or a shape is wrong.
    """
    check_dropout(x, p, samples, columns)
    if p == 0.0:
        return x
    return _Dropout.apply(x, p, mask_key(seed, site), samples, columns, feature_start)  # type: ignore[no-untyped-call]


def dropout_add_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    p: float,
    *,
    seed: int,
    site: int,
    samples: torch.Tensor,
    columns: torch.Tensor,
    feature_start: int = 0,
) -> torch.Tensor:
    """``residual + dropout(x)``, in fp32 and rounded once.

    Args:
        x: (B, T, D), what a layer adds to the residual stream: the features ``feature_start:feature_start + D`` of some tokens.
        residual: like x.
        p: probability of a zero, in [0, 1). With 0 the answer is the plain sum.
        seed: of the run.
        site: from ``site_number``.
        samples: (B,) int64, global number of the sample in each row, at least 0.
        columns: (T,) int64, index of each token in its row, in [0, 2**32).
        feature_start: of this part, when features are divided over ranks.

    Returns:
        (B, T, D), dtype of x.

    Raises:
        ValueError: p or a shape is wrong.
    """
    check_dropout_add(x, residual, p, samples, columns)
    if p == 0.0:
        return residual + x
    wide = torch.promote_types(x.dtype, torch.float32)
    dropped = _Dropout.apply(x.to(wide), p, mask_key(seed, site), samples, columns, feature_start)  # type: ignore[no-untyped-call]
    return (residual.to(wide) + dropped).to(x.dtype)


def keep_mask(
    num_features: int,
    p: float,
    *,
    seed: int,
    site: int,
    samples: torch.Tensor,
    columns: torch.Tensor,
    feature_start: int = 0,
) -> torch.Tensor:
    """Which elements dropout keeps: (B, T, num_features) bool. Arguments as ``dropout_reference``."""
    return _keep(num_features, p, mask_key(seed, site), samples, columns, feature_start)


def mask_key(seed: int, site: int) -> tuple[int, int]:
    """Key of the generator, two numbers in [0, 2**32)."""
    # index() is a no-op that makes torch's compiler take numbers that change from call to call for constants.
    return _hashed(operator.index(seed), operator.index(site))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # the compiler cannot look into hashlib
def _hashed(seed: int, site: int) -> tuple[int, int]:
    # A hash, so that the whole of a large seed counts, and neighbouring seeds and sites get unrelated keys.
    digest = hashlib.sha256(f"dropout/{seed}/{site}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def check_dropout(x: torch.Tensor, p: float, samples: torch.Tensor, columns: torch.Tensor) -> None:
    """Check the arguments of a dropout; positions count only where something is dropped.

    Raises:
        ValueError: p or a shape is wrong.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), it is {p}")
    if p > 0.0 and (x.dim() != 3 or samples.shape != x.shape[:1] or columns.shape != x.shape[1:2]):
        raise ValueError(
            f"dropout needs x (B, T, D) with samples (B,) and columns (T,); "
            f"they are {tuple(x.shape)}, {tuple(samples.shape)} and {tuple(columns.shape)}"
        )


def check_dropout_add(x: torch.Tensor, residual: torch.Tensor, p: float, samples: torch.Tensor, columns: torch.Tensor) -> None:
    """``check_dropout``, and the residual must have the shape of x.

    Raises:
        ValueError: p or a shape is wrong.
    """
    if residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must have the shape of x {tuple(x.shape)}")
    check_dropout(x, p, samples, columns)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        p: float,
        key: tuple[int, int],
        samples: torch.Tensor,
        columns: torch.Tensor,
        feature_start: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(samples, columns)
        ctx.rest = (p, key, feature_start)
        return _apply(x, p, key, samples, columns, feature_start)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        p, key, feature_start = ctx.rest
        samples, columns = ctx.saved_tensors
        return _apply(grad, p, key, samples, columns, feature_start), None, None, None, None, None


def _apply(
    x: torch.Tensor, p: float, key: tuple[int, int], samples: torch.Tensor, columns: torch.Tensor, feature_start: int
) -> torch.Tensor:
    keep = _keep(x.shape[-1], p, key, samples, columns, feature_start)
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0)


def _keep(
    num_features: int, p: float, key: tuple[int, int], samples: torch.Tensor, columns: torch.Tensor, feature_start: int
) -> torch.Tensor:
    first = feature_start // _WORDS
    last = -(-(feature_start + num_features) // _WORDS)
    sample = samples.view(-1, 1, 1)
    counter = (
        torch.arange(first, last, device=samples.device).view(1, 1, -1),
        columns.view(1, -1, 1),
        sample & _MASK,
        (sample >> 32) & _MASK,
    )
    words = torch.stack(philox_4x32(counter, key), dim=-1)  # (B, T, counters, 4)
    skip = feature_start - first * _WORDS
    return words.flatten(-2)[..., skip : skip + num_features] >= round(p * 2.0**32)
