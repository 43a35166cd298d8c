"""Rows of a table by number in C++ and CUDA: schemas, shapes without data, and gradients. The device code is in csrc/embedding/.

Forward gathers and converts in one pass. Backward sorts the tokens by row and adds those of each row in their order, in fp32: the same bits
twice, and at any number of threads. Only the rows with a token cost anything, apart from the zeros that a whole gradient is made of.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_llm.kernels.extension import why_no_kernel

__all__ = ["embedding_backward_into_native", "embedding_native", "why_not_native"]

torch.library.define("dist_llm::embedding", "(Tensor ids, Tensor weight, ScalarType dtype) -> Tensor")
torch.library.define("dist_llm::embedding_backward", "(Tensor drows, Tensor ids, int num_rows, ScalarType dtype) -> Tensor")
torch.library.define("dist_llm::embedding_backward_into", "(Tensor drows, Tensor ids, Tensor(a!) dweight) -> ()")


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot run, or None. Loads the extension at the first call."""
    return why_no_kernel("embedding", device, dtype)


def _fake(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]), dtype=dtype)


def _fake_backward(drows: torch.Tensor, ids: torch.Tensor, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    del ids
    return drows.new_empty((num_rows, drows.shape[-1]), dtype=dtype)


def _fake_backward_into(drows: torch.Tensor, ids: torch.Tensor, dweight: torch.Tensor) -> None:
    del drows, ids, dweight


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    ids, weight, _ = inputs
    ctx.save_for_backward(ids)
    ctx.num_rows, ctx.weight_dtype = weight.shape[0], weight.dtype


def _backward(ctx: Any, drows: torch.Tensor) -> tuple[None, torch.Tensor, None]:
    (ids,) = ctx.saved_tensors
    return None, torch.ops.dist_llm.embedding_backward(drows.contiguous(), ids, ctx.num_rows, ctx.weight_dtype), None


torch.library.register_fake("dist_llm::embedding", _fake)
torch.library.register_fake("dist_llm::embedding_backward", _fake_backward)
torch.library.register_fake("dist_llm::embedding_backward_into", _fake_backward_into)
torch.library.register_autograd("dist_llm::embedding", _backward, setup_context=_save)


def embedding_native(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``embedding_reference`` in one pass over memory; ask ``why_not_native`` first, as ``select`` does.

    Args:
        ids: (...) int64, each at least 0 and below V.
        weight: (V, D), fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
        dtype: of the result, any of these.

    Returns:
        (..., D) in ``dtype``.

    Raises:
        RuntimeError: an id is out of range (on CUDA, where the host does not wait, the device stops), or a dtype is none of these.
    """
    rows: torch.Tensor = torch.ops.dist_llm.embedding(ids.contiguous(), weight.contiguous(), dtype)
    return rows


def embedding_backward_into_native(grad_out: torch.Tensor, ids: torch.Tensor, weight_grad: torch.Tensor) -> None:
    """``embedding_backward_into_reference`` without touching rows that have no token; ask ``why_not_native`` first, as ``select`` does.

    Args:
        grad_out: (..., D), fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
        ids: (...) int64, each at least 0 and below V.
        weight_grad: (V, D), any of these dtypes, contiguous, written in place.

    Raises:
        RuntimeError: an id is out of range (on CUDA, where the host does not wait, the device stops), or a shape or dtype does not fit.
    """
    torch.ops.dist_llm.embedding_backward_into(grad_out.detach().contiguous(), ids.contiguous(), weight_grad)
    if not torch.compiler.is_compiling():
        # An op of ours does not tell autograd that it wrote; a graph that saved an old value must find out.
        torch.autograd.graph.increment_version(weight_grad)
