"""The experts' MLPs from grouped linear layers and the compiled activations.

Saved for backward are the rows, both inner products and the activation between them: what a dense MLP of as many rows saves.
"""

from __future__ import annotations

import torch

from dist_llm.kernels.activation.native import gelu_native, swiglu_native
from dist_llm.kernels.activation.native import why_not_native as why_not_native_activation
from dist_llm.kernels.moe.grouped_linear import grouped_linear
from dist_llm.kernels.moe.reference import check_mlp

__all__ = ["expert_mlp_native", "why_not_native_mlp"]


def why_not_native_mlp(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled activations cannot run, or None: the products are torch's own. Loads the extension at the first call."""
    reason = why_not_native_activation(device, dtype)
    return None if reason is None else f"its activation cannot run: {reason}"


def expert_mlp_native(
    rows: torch.Tensor, counts: torch.Tensor, gate: torch.Tensor | None, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """``expert_mlp_reference`` without a copy of the rows or a product of its own for nothing; ask ``why_not_native_mlp`` first.

    On CUDA the counts stay on the device where torch has a grouped product (see ``grouped_linear``).

    Args:
        rows: (R, H), sorted by expert, fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
        counts: (E,), int32, rows of each expert, R or fewer together.
        gate: (E, F, H), or None for gelu.
        up: (E, F, H), dtype of rows, or fp32 masters, which are cast.
        down: (E, H, F), likewise.

    Returns:
        (R, H), dtype of rows; zeros for the rows that belong to no expert.

    Raises:
        ValueError: the shapes do not fit; or counts do not, where that is seen without a synchronisation.
    """
    check_mlp(rows, counts, gate, up, down)
    inner = grouped_linear(rows, counts, up)
    inner = gelu_native(inner) if gate is None else swiglu_native(grouped_linear(rows, counts, gate), inner)
    return grouped_linear(inner, counts, down)
