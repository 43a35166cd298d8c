"""Linear layers with oneDNN's products and our gradient of the weights. CPU, bf16. The device code is in csrc/linear/.

The gradient of a weight sums over the tokens, which are the rows of both of its factors, and oneDNN runs that product at 80 to 85 % of the rate of
the other two (docs/log.md). Ours packs both factors by pairs of rows as the processor's bf16 products want them, and sums the gradient of the bias
on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_llm.kernels.extension import why_no_kernel
from dist_llm.kernels.linear.onednn import onednn_layers, why_not_onednn

__all__ = ["joint_linear_native", "linear_native", "weight_grad_native", "why_not_native"]

torch.library.define("dist_llm::linear_weight_grad", "(Tensor dy, Tensor x) -> (Tensor, Tensor)")


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled gradient cannot run, or None. Loads the extension at the first call."""
    reason = why_not_onednn(device, dtype) or why_no_kernel("linear_weight_grad", device)
    if reason is None and not torch.ops.dist_llm.cpu_multiplies_bf16():
        return "it is for processors with AVX-512 and BF16 products (AVX512_BF16), or DIST_LLM_CPU_ISA leaves them out"
    return reason


def _fake(dy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return dy.new_empty(dy.shape[1], x.shape[1]), dy.new_empty(dy.shape[1])


torch.library.register_fake("dist_llm::linear_weight_grad", _fake)


def weight_grad_native(dy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight_grad_reference`` in one pass over both; ask ``why_not_native`` first, as ``select`` does.

    Args:
        dy: (R, N) bf16; copied when it is not contiguous.
        x: (R, K) bf16; likewise.

    Returns:
        (N, K) and (N,) bf16, summed in fp32 and rounded once.

    Raises:
        RuntimeError: a shape or dtype does not fit.
    """
    grads: tuple[torch.Tensor, torch.Tensor] = torch.ops.dist_llm.linear_weight_grad(dy.contiguous(), x.contiguous())
    return grads


def linear_native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``linear_reference``; ask ``why_not_native`` first, as ``select`` does.

    Args:
        x: (..., K) bf16.
        weight: (N, K) bf16.
        bias: (N,) bf16, or None.

    Returns:
        (..., N) bf16.
    """
    return onednn_layers(x, [weight], [bias], weight_grad_native)


def joint_linear_native(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """``joint_linear_reference``; ask ``why_not_native`` first, as ``select`` does.

    Args:
        x: (..., K) bf16.
        weights: (N_i, K) bf16 each.
        biases: (N_i,) bf16 each; or a None for each.

    Returns:
        (..., N_1 + N_2 + ...) bf16.
    """
    return onednn_layers(x, weights, biases, weight_grad_native)
