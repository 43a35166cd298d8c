"""Dropout in C++ and CUDA: schemas, shapes without data, and gradients. The device code is in csrc/dropout/.

The mask is the reference's, bit for bit. Backward makes it again from the same few numbers; no tensor of the size of x is kept.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_llm.kernels.dropout.reference import check_dropout, check_dropout_add, mask_key
from dist_llm.kernels.extension import why_no_kernel

__all__ = ["dropout_add_native", "dropout_native", "why_not_native"]

_MASK = "float p, int key0, int key1, Tensor samples, Tensor columns, int feature_start"
torch.library.define("dist_llm::dropout", f"(Tensor x, {_MASK}) -> Tensor")
torch.library.define("dist_llm::dropout_add", f"(Tensor x, Tensor residual, {_MASK}) -> Tensor")


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot run, or None. Loads the extension at the first call."""
    return why_no_kernel("dropout", device, dtype)


def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    del rest
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    *_, p, key0, key1, samples, columns, feature_start = inputs
    ctx.save_for_backward(samples, columns)
    ctx.rest = (p, key0, key1, feature_start)


def _gradient_of_x(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
    p, key0, key1, feature_start = ctx.rest
    samples, columns = ctx.saved_tensors
    # Gradients can arrive with any strides, the kernel wants them contiguous.
    dx: torch.Tensor = torch.ops.dist_llm.dropout(dy.contiguous(), p, key0, key1, samples, columns, feature_start)
    return dx


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _gradient_of_x(ctx, dy), None, None, None, None, None, None


def _backward_add(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _gradient_of_x(ctx, dy), dy, None, None, None, None, None, None


torch.library.register_fake("dist_llm::dropout", _fake)
torch.library.register_fake("dist_llm::dropout_add", _fake)
torch.library.register_autograd("dist_llm::dropout", _backward, setup_context=_save)
torch.library.register_autograd("dist_llm::dropout_add", _backward_add, setup_context=_save)


def dropout_native(
    x: torch.Tensor,
    p: float,
    *,
    seed: int,
    site: int,
    samples: torch.Tensor,
    columns: torch.Tensor,
    feature_start: int = 0,
) -> torch.Tensor:
    """``dropout_reference`` in one pass over memory, the same bits; ask ``why_not_native`` first, as ``select`` does.

    Args:
        x: (B, T, D), fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
        p: probability of a zero, in [0, 1). With 0 the answer is ``x`` itself.
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
    check_dropout(x, p, samples, columns)
    if p == 0.0:
        return x
    key0, key1 = mask_key(seed, site)
    y: torch.Tensor = torch.ops.dist_llm.dropout(x.contiguous(), p, key0, key1, samples.contiguous(), columns.contiguous(), feature_start)
    return y


def dropout_add_native(
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
    """``dropout_add_reference`` in one pass over memory; ask ``why_not_native`` first, as ``select`` does.

    Args:
        x: (B, T, D), fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
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
    key0, key1 = mask_key(seed, site)
    y: torch.Tensor = torch.ops.dist_llm.dropout_add(
        x.contiguous(), residual.contiguous(), p, key0, key1, samples.contiguous(), columns.contiguous(), feature_start
    )
    return y
