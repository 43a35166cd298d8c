"""Linear layers by oneDNN with the bias added inside the product. CPU, bf16.

torch's ``addmm`` on CPU first copies the bias into every row of the result and then adds the product to it: one more pass over the
result, 5 to 25 % of a layer of a small model. oneDNN adds the bias while a tile of the result is in registers. The gradient of the bias is
summed over the rows as a matrix, which torch does several times faster than over two dimensions of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_llm.kernels.linear.function import LinearProduct, WeightGrad
from dist_llm.kernels.linear.reference import joint_linear_reference, weight_grad_reference
from dist_llm.kernels.strides import contiguous

__all__ = ["joint_linear_onednn", "linear_onednn", "onednn_layers", "weight_grad_onednn", "why_not_onednn"]


def why_not_onednn(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why oneDNN's fused product cannot be used, or None."""
    if device.type != "cpu":
        return f"it is for CPU, not {device.type}"
    if dtype != torch.bfloat16:
        return f"it takes torch.bfloat16, not {dtype}"
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN takes bf16 only on processors with AVX-512 (BW, VL, DQ)"
    return None


def onednn_layers(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], weight_grad: WeightGrad
) -> torch.Tensor:
    """``joint_linear_reference`` of one layer or several by oneDNN's product, with the gradients of weights and biases by ``weight_grad``."""
    if x.numel() == 0 or all(weight.numel() == 0 for weight in weights):
        return joint_linear_reference(x, weights, biases)  # oneDNN refuses empty products
    y: torch.Tensor = LinearProduct.apply(_product, weight_grad, x, len(weights), *weights, *biases)  # type: ignore[no-untyped-call]
    return y


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # It reads a bias as if it were contiguous.
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), contiguous(bias), "none", [], "")
    return y


def linear_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``linear_reference``; ask ``why_not_onednn`` first, as ``select`` does.

    Args:
        x: (..., K) bf16.
        weight: (N, K) bf16.
        bias: (N,) bf16, or None.

    Returns:
        (..., N) bf16.
    """
    return onednn_layers(x, [weight], [bias], weight_grad_onednn)


def joint_linear_onednn(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """``joint_linear_reference``; ask ``why_not_onednn`` first, as ``select`` does.

    Args:
        x: (..., K) bf16.
        weights: (N_i, K) bf16 each.
        biases: (N_i,) bf16 each; or a None for each.

    Returns:
        (..., N_1 + N_2 + ...) bf16.
    """
    return onednn_layers(x, weights, biases, weight_grad_onednn)


def weight_grad_onednn(dy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight_grad_reference``, the same bits whatever the strides; ask ``why_not_onednn`` first, as ``select`` does.

    Args:
        dy: (R, N) bf16.
        x: (R, K) bf16.

    Returns:
        (N, K) and (N,) bf16.
    """
    return weight_grad_reference(dy.contiguous(), x.contiguous())
