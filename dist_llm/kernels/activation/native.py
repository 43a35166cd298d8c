"""Gelu and swiglu in C++ and CUDA: schemas, shapes without data, and gradients. The device code is in csrc/activation/.

Forward saves its inputs, not its result; backward computes what it needs of them again, gradients of the biases in the same pass.
Those are summed in fp32, in an order that depends on the shape only: the same bits twice, and at any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_llm.kernels.activation.reference import check_activation, check_gated
from dist_llm.kernels.dropout.reference import mask_key
from dist_llm.kernels.extension import why_no_kernel

__all__ = ["gelu_native", "swiglu_native", "why_not_native"]

_MASK = "float p, int key0, int key1, Tensor? samples, Tensor? columns, int feature_start"
_GATED = "Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias"
torch.library.define("dist_llm::gelu", f"(Tensor x, Tensor? bias, {_MASK}) -> Tensor")
torch.library.define("dist_llm::gelu_backward", f"(Tensor dy, Tensor x, Tensor? bias, {_MASK}) -> (Tensor dx, Tensor dbias)")
torch.library.define("dist_llm::swiglu", f"({_GATED}, {_MASK}) -> Tensor")
torch.library.define(
    "dist_llm::swiglu_backward", f"(Tensor dy, {_GATED}, {_MASK}) -> (Tensor dgate, Tensor dup, Tensor dgate_bias, Tensor dup_bias)"
)

Tensors = tuple[torch.Tensor, ...]
Grads = tuple[torch.Tensor | None, ...]
NOTHING_DROPPED = (0.0, 0, 0, None, None, 0)


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot run, or None. Loads the extension at the first call."""
    return why_no_kernel("gelu", device, dtype)


def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    del rest
    return torch.empty_like(x)


def _fake_gelu_backward(dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> Tensors:
    del dy, rest
    return torch.empty_like(x), _empty_like_bias(bias, x)


def _fake_swiglu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, gate_bias: torch.Tensor | None, up_bias: torch.Tensor | None, *rest: Any
) -> Tensors:
    del dy, rest
    return torch.empty_like(gate), torch.empty_like(up), _empty_like_bias(gate_bias, gate), _empty_like_bias(up_bias, gate)


def _empty_like_bias(bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(0) if bias is None else torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    *tensors, p, key0, key1, samples, columns, feature_start = inputs
    ctx.save_for_backward(*tensors, samples, columns)
    ctx.rest = (p, key0, key1, feature_start)


# Gradients can arrive with any strides (that of a sum is one number, repeated), the kernels want them contiguous.


def _gelu_backward(ctx: Any, dy: torch.Tensor) -> Grads:
    x, bias, samples, columns = ctx.saved_tensors
    p, key0, key1, feature_start = ctx.rest
    dx, dbias = torch.ops.dist_llm.gelu_backward(dy.contiguous(), x, bias, p, key0, key1, samples, columns, feature_start)
    return dx, None if bias is None else dbias, *(None,) * 6


def _swiglu_backward(ctx: Any, dy: torch.Tensor) -> Grads:
    gate, up, gate_bias, up_bias, samples, columns = ctx.saved_tensors
    p, key0, key1, feature_start = ctx.rest
    dgate, dup, dgate_bias, dup_bias = torch.ops.dist_llm.swiglu_backward(
        dy.contiguous(), gate, up, gate_bias, up_bias, p, key0, key1, samples, columns, feature_start
    )
    biases = (None, None) if gate_bias is None else (dgate_bias, dup_bias)
    return dgate, dup, *biases, *(None,) * 6


torch.library.register_fake("dist_llm::gelu", _fake)
torch.library.register_fake("dist_llm::gelu_backward", _fake_gelu_backward)
torch.library.register_fake("dist_llm::swiglu", _fake)
torch.library.register_fake("dist_llm::swiglu_backward", _fake_swiglu_backward)
torch.library.register_autograd("dist_llm::gelu", _gelu_backward, setup_context=_save)
torch.library.register_autograd("dist_llm::swiglu", _swiglu_backward, setup_context=_save)


def gelu_native(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    p: float = 0.0,
    seed: int = 0,
    site: int = 0,
    samples: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    feature_start: int = 0,
) -> torch.Tensor:
    """``gelu_reference`` in one pass over memory; ask ``why_not_native`` first, as ``select`` does.

    Args:
        x: (..., F), fp32 or bf16 (CUDA: fp16 too); with ``p`` (B, T, F); copied when it is not contiguous.
        bias: (F,), dtype of x or fp32.
        p: probability that dropout zeroes an element, in [0, 1); the arguments that follow count only where it is not 0.
        seed: of the run.
        site: from ``kernels.dropout.site_number``.
        samples: (B,) int64, global number of the sample in each row.
        columns: (T,) int64, index of each token in its row.
        feature_start: of this part, when features are divided over ranks.

    Returns:
        (..., F), dtype of x.

    Raises:
        ValueError: p or a shape is wrong.
    """
    check_activation(x, bias, p, samples, columns)
    y: torch.Tensor = torch.ops.dist_llm.gelu(x.contiguous(), bias, *_mask(p, seed, site, samples, columns, feature_start))
    return y


def swiglu_native(
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    *,
    p: float = 0.0,
    seed: int = 0,
    site: int = 0,
    samples: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    feature_start: int = 0,
) -> torch.Tensor:
    """``swiglu_reference`` in one pass over memory; ask ``why_not_native`` first, as ``select`` does.

    Args:
        gate: (..., F), fp32 or bf16 (CUDA: fp16 too); with ``p`` (B, T, F); copied when it is not contiguous.
        up: like gate.
        gate_bias: (F,), dtype of gate or fp32; both biases or none.
        up_bias: like gate_bias.
        p: probability that dropout zeroes an element, in [0, 1); the arguments that follow count only where it is not 0.
        seed: of the run.
        site: from ``kernels.dropout.site_number``.
        samples: (B,) int64, global number of the sample in each row.
        columns: (T,) int64, index of each token in its row.
        feature_start: of this part, when features are divided over ranks.

    Returns:
        (..., F), dtype of gate.

    Raises:
        ValueError: p, a shape or a pair of biases is wrong.
    """
    check_gated(gate, up, gate_bias, up_bias, p, samples, columns)
    y: torch.Tensor = torch.ops.dist_llm.swiglu(
        gate.contiguous(), up.contiguous(), gate_bias, up_bias, *_mask(p, seed, site, samples, columns, feature_start)
    )
    return y


def _mask(
    p: float, seed: int, site: int, samples: torch.Tensor | None, columns: torch.Tensor | None, feature_start: int
) -> tuple[float, int, int, torch.Tensor | None, torch.Tensor | None, int]:
    if p == 0.0:
        return NOTHING_DROPPED
    assert samples is not None and columns is not None  # check_activation has seen to it
    return p, *mask_key(seed, site), samples.contiguous(), columns.contiguous(), feature_start
