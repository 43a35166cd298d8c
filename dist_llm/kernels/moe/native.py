"""Mixture of experts in C++ and CUDA: schemas, shapes without data, and gradients. The device code is in csrc/moe/.

The gradient of ``moe_permute`` is ``moe_unpermute`` without weights. Sums over the slots of a token and over the experts are in fp32 and in
one order: the same bits twice, and at any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_llm.kernels.extension import why_no_kernel
from dist_llm.kernels.moe.reference import Route, Scores, check_route, check_unpermute
from dist_llm.kernels.strides import contiguous

__all__ = ["moe_permute_native", "moe_route_native", "moe_unpermute_native", "why_not_native", "why_not_native_route"]

torch.library.define(
    "dist_llm::moe_route",
    "(Tensor logits, Tensor? bias, int top_k, bool sigmoid, int groups, int groups_kept, bool normalize, float scale)"
    " -> (Tensor weights, Tensor experts, Tensor probabilities, Tensor counts)",
)
torch.library.define(
    "dist_llm::moe_route_backward",
    "(Tensor? dweights, Tensor? dprobabilities, Tensor weights, Tensor experts, Tensor probabilities, bool sigmoid, bool normalize,"
    " float scale, ScalarType dtype) -> Tensor dlogits",
)
torch.library.define(
    "dist_llm::moe_permute",
    "(Tensor x, Tensor experts, int num_experts) -> (Tensor rows, Tensor source, Tensor counts, Tensor offsets)",
)
torch.library.define("dist_llm::moe_unpermute", "(Tensor rows, Tensor source, Tensor? weights, int top_k) -> Tensor")
torch.library.define(
    "dist_llm::moe_unpermute_backward",
    "(Tensor dout, Tensor? rows, Tensor source, Tensor? weights, int top_k) -> (Tensor drows, Tensor dweights)",
)

Tensors = tuple[torch.Tensor, ...]
Grads = tuple[torch.Tensor | None, ...]


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels of permute and unpermute cannot run, or None. Loads the extension at the first call."""
    return why_no_kernel("moe_permute", device, dtype)


def why_not_native_route(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same of the choice of experts; ``dtype`` is that of the logits."""
    return why_no_kernel("moe_route", device, dtype)


# Shapes without data.


def _fake_route(logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, *options: Any) -> Tensors:
    del bias, options
    chosen = (logits.shape[0], top_k)
    return (
        logits.new_empty(chosen, dtype=torch.float32),
        logits.new_empty(chosen, dtype=torch.int32),
        logits.new_empty(logits.shape, dtype=torch.float32),
        logits.new_empty(logits.shape[1:], dtype=torch.int32),
    )


def _fake_route_backward(
    dweights: torch.Tensor | None,
    dprobabilities: torch.Tensor | None,
    weights: torch.Tensor,
    experts: torch.Tensor,
    probabilities: torch.Tensor,
    sigmoid: bool,
    normalize: bool,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    del dweights, dprobabilities, weights, experts, sigmoid, normalize, scale
    return probabilities.new_empty(probabilities.shape, dtype=dtype)


def _fake_permute(x: torch.Tensor, experts: torch.Tensor, num_experts: int) -> Tensors:
    slots = experts.shape[0] * experts.shape[1]
    return (
        x.new_empty(slots, x.shape[1]),
        experts.new_empty(slots),
        experts.new_empty(num_experts),
        experts.new_empty(num_experts + 1),
    )


def _fake_unpermute(rows: torch.Tensor, source: torch.Tensor, weights: torch.Tensor | None, top_k: int) -> torch.Tensor:
    del source, weights
    return rows.new_empty(rows.shape[0] // top_k, rows.shape[1])


def _fake_unpermute_backward(
    dout: torch.Tensor, rows: torch.Tensor | None, source: torch.Tensor, weights: torch.Tensor | None, top_k: int
) -> Tensors:
    del rows, top_k
    dweights = dout.new_empty(0, dtype=torch.float32) if weights is None else weights.new_empty(weights.shape)
    return dout.new_empty(source.shape[0], dout.shape[1]), dweights


# Gradients. They can arrive with any strides (that of a sum is one number, repeated), the kernels want them contiguous. A result nobody
# used sends None instead of a tensor of zeros: probabilities, where there is no balancing loss, are as large as the logits.


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    logits, _, _, sigmoid, _, _, normalize, scale = inputs
    weights, experts, probabilities, counts = output
    ctx.mark_non_differentiable(experts, counts)
    ctx.save_for_backward(weights, experts, probabilities)
    ctx.options = (sigmoid, normalize, scale, logits.dtype)
    ctx.set_materialize_grads(False)


def _backward_route(ctx: Any, dweights: torch.Tensor | None, dexperts: None, dprobabilities: torch.Tensor | None, dcounts: None) -> Grads:
    del dexperts, dcounts
    dlogits = None
    if dweights is not None or dprobabilities is not None:
        grads = (contiguous(dweights), contiguous(dprobabilities))
        dlogits = torch.ops.dist_llm.moe_route_backward(*grads, *ctx.saved_tensors, *ctx.options)
    return dlogits, *[None] * 7


def _save_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    _, experts, _ = inputs
    _, source, counts, offsets = output
    ctx.mark_non_differentiable(source, counts, offsets)
    ctx.save_for_backward(source)
    ctx.top_k = experts.shape[1]
    ctx.set_materialize_grads(False)


def _backward_permute(ctx: Any, drows: torch.Tensor | None, *no_gradients: None) -> Grads:
    del no_gradients
    if drows is None:
        return None, None, None
    (source,) = ctx.saved_tensors
    return torch.ops.dist_llm.moe_unpermute(drows.contiguous(), source, None, ctx.top_k), None, None


def _save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    rows, source, weights, top_k = inputs
    # The rows are needed for the gradient of the weights alone.
    ctx.save_for_backward(None if weights is None else rows, source, weights)
    ctx.top_k = top_k


def _backward_unpermute(ctx: Any, dout: torch.Tensor) -> Grads:
    rows, source, weights = ctx.saved_tensors
    drows, dweights = torch.ops.dist_llm.moe_unpermute_backward(dout.contiguous(), rows, source, weights, ctx.top_k)
    return drows, None, None if weights is None else dweights, None


torch.library.register_fake("dist_llm::moe_route", _fake_route)
torch.library.register_fake("dist_llm::moe_route_backward", _fake_route_backward)
torch.library.register_fake("dist_llm::moe_permute", _fake_permute)
torch.library.register_fake("dist_llm::moe_unpermute", _fake_unpermute)
torch.library.register_fake("dist_llm::moe_unpermute_backward", _fake_unpermute_backward)
torch.library.register_autograd("dist_llm::moe_route", _backward_route, setup_context=_save_route)
torch.library.register_autograd("dist_llm::moe_permute", _backward_permute, setup_context=_save_permute)
torch.library.register_autograd("dist_llm::moe_unpermute", _backward_unpermute, setup_context=_save_unpermute)


def moe_route_native(
    logits: torch.Tensor,
    top_k: int,
    *,
    scores: Scores = "softmax",
    bias: torch.Tensor | None = None,
    groups: int = 1,
    groups_kept: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> Route:
    """``moe_route_reference`` with one pass over the logits; ask ``why_not_native_route`` first, as ``select`` does.

    Args:
        logits: (T, E), fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
        top_k: experts of a token.
        scores: ``softmax`` or ``sigmoid``.
        bias: (E,), fp32, for the choice alone.
        groups: divides E.
        groups_kept: groups a token may choose from.
        normalize: the weights of a token add up to one.
        scale: of the weights.

    Returns:
        weights (T, top_k) and probabilities (T, E) in fp32, differentiable; experts (T, top_k) and counts (E,) in int32.

    Raises:
        ValueError: as ``check_route`` says.
    """
    check_route(logits, top_k, scores, bias, groups, groups_kept, scale)
    route: Route = torch.ops.dist_llm.moe_route(
        logits.contiguous(), contiguous(bias), top_k, scores == "sigmoid", groups, groups_kept, normalize, scale
    )
    return route


def moe_permute_native(
    x: torch.Tensor, experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``moe_permute_reference`` as a counting sort and one copy; ask ``why_not_native`` first, as ``select`` does.

    Args:
        x: (T, H), fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
        experts: (T, top_k), int32, from -1 (no expert) to num_experts - 1. On CPU another number is an error, on CUDA it counts as -1.
        num_experts: E.

    Returns:
        rows (T * top_k, H), dtype of x, differentiable; source (T * top_k,), counts (E,) and offsets (E + 1,) in int32.

    Raises:
        RuntimeError: the shapes or dtypes do not fit, or (on CPU) an expert is out of range; the message names it.
    """
    sorted_rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    sorted_rows = torch.ops.dist_llm.moe_permute(x.contiguous(), experts.contiguous(), num_experts)
    return sorted_rows


def moe_unpermute_native(rows: torch.Tensor, source: torch.Tensor, weights: torch.Tensor | None, *, top_k: int) -> torch.Tensor:
    """``moe_unpermute_reference`` in one pass over memory; ask ``why_not_native`` first, as ``select`` does.

    Args:
        rows: (T * top_k, H), fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
        source: (T * top_k,), int32, of ``moe_permute``. On CPU a number out of range, or one that occurs twice, is an error.
        weights: (T, top_k), fp32, or None for ones.
        top_k: slots of a token.

    Returns:
        (T, H), dtype of rows.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_unpermute(rows, source, weights, top_k)
    out: torch.Tensor = torch.ops.dist_llm.moe_unpermute(rows.contiguous(), source.contiguous(), contiguous(weights), top_k)
    return out
