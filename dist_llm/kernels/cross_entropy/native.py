"""Cross-entropy in C++: schemas, shapes without data, and gradients. The device code is in csrc/cross_entropy/.

Forward reads the logits once, as they are, and saves two fp32 numbers a row; backward writes their gradient in one pass. There is
no fp32 copy of the logits. The same bits twice, and at any number of threads.

``linear_cross_entropy`` makes the logits itself, some rows at a time, and turns them into their gradient where they lie: one buffer,
which stays in a cache, is all there ever is of them.

N rows, V vocabulary, D model dim.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_llm.kernels.extension import why_no_kernel

__all__ = [
    "cross_entropy_backward_native",
    "cross_entropy_native",
    "cross_entropy_partials_native",
    "linear_cross_entropy_native",
    "why_not_native",
]

torch.library.define(
    "dist_llm::cross_entropy", "(Tensor logits, Tensor targets, int ignore, float z_loss) -> (Tensor loss, Tensor row_max, Tensor row_sum)"
)
torch.library.define(
    "dist_llm::cross_entropy_backward",
    "(Tensor dloss, Tensor logits, Tensor targets, Tensor row_max, Tensor row_sum, int ignore, float z_loss, int vocab_start) -> Tensor",
)
torch.library.define(
    "dist_llm::cross_entropy_partials",
    "(Tensor logits, Tensor targets, int ignore, int vocab_start) -> (Tensor row_max, Tensor row_sum, Tensor target_logit)",
)
torch.library.define(
    "dist_llm::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, int ignore, float z_loss, int chunks, bool needs_grad)"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight)",
)
torch.library.define("dist_llm::cross_entropy_grad_", "(Tensor(a!) logits, Tensor targets, int ignore, float z_loss) -> Tensor loss")
torch.library.define("dist_llm::cross_entropy_add_", "(Tensor(a!) total, Tensor part) -> ()")

# Of a product that is added to the gradient of the weight: 1.5 MiB in bf16, about a second-level cache of a CPU core. On a GPU, where a
# product of that size is over before the next one is launched, 128 MiB.
BLOCK_ELEMENTS = 3 << 18
CUDA_BLOCK_ELEMENTS = 1 << 26

Tensors = tuple[torch.Tensor, ...]
Grads = tuple[torch.Tensor | None, ...]


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot run, or None. Loads the extension at the first call."""
    return why_no_kernel("cross_entropy", device, dtype)


def _per_row(logits: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.float32)


def _scalar(logits: torch.Tensor) -> torch.Tensor:
    return logits.new_empty((), dtype=torch.float32)


def _fake(logits: torch.Tensor, targets: torch.Tensor, ignore: int, z_loss: float) -> Tensors:
    del targets, ignore, z_loss
    return _scalar(logits), _per_row(logits), _per_row(logits)


def _fake_backward(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    ignore: int,
    z_loss: float,
    vocab_start: int,
) -> torch.Tensor:
    del dloss, targets, row_max, row_sum, ignore, z_loss, vocab_start
    return torch.empty_like(logits)


def _fake_partials(logits: torch.Tensor, targets: torch.Tensor, ignore: int, vocab_start: int) -> Tensors:
    del targets, ignore, vocab_start
    return _per_row(logits), _per_row(logits), _per_row(logits)


def _fake_grad(logits: torch.Tensor, targets: torch.Tensor, ignore: int, z_loss: float) -> torch.Tensor:
    del targets, ignore, z_loss
    return _scalar(logits)


def _fake_add(total: torch.Tensor, part: torch.Tensor) -> None:
    del total, part


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    logits, targets, ctx.ignore, ctx.z_loss = inputs
    ctx.save_for_backward(logits, targets, output[1], output[2])


def _backward(ctx: Any, dloss: torch.Tensor, dmax: torch.Tensor | None, dsum: torch.Tensor | None) -> Grads:
    # row_max and row_sum are for backward only; nothing flows through them.
    del dmax, dsum
    logits, targets, row_max, row_sum = ctx.saved_tensors
    dlogits = torch.ops.dist_llm.cross_entropy_backward(dloss, logits, targets, row_max, row_sum, ctx.ignore, ctx.z_loss, 0)
    return dlogits, None, None, None


def linear_forward(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore: int, z_loss: float, chunks: int, needs_grad: bool
) -> Tensors:
    """The body of ``dist_llm::linear_cross_entropy``: loss, and for dloss = 1 the gradients, which are empty when not wanted."""
    num_rows, (vocab, dim) = hidden.shape[0], weight.shape
    at_once = max(1, num_rows // chunks)
    narrow = weight.to(hidden.dtype)
    # The gradient of hidden is a sum over the vocabulary: along rows of the transposed weight the product is a sixth faster, for each chunk.
    across = narrow.t().contiguous() if needs_grad else narrow
    adds = why_no_kernel("cross_entropy_add_", hidden.device) is None
    block = max(1, (CUDA_BLOCK_ELEMENTS if hidden.is_cuda else BLOCK_ELEMENTS) // dim)
    logits = hidden.new_empty(at_once, vocab)
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    dhidden = torch.empty_like(hidden) if needs_grad else hidden.new_empty(0)
    dweight = weight.new_zeros(vocab, dim, dtype=torch.float32) if needs_grad else weight.new_empty(0, dtype=torch.float32)
    for begin in range(0, num_rows, at_once):
        rows = slice(begin, min(begin + at_once, num_rows))
        part = logits[: rows.stop - begin]
        torch.mm(hidden[rows], narrow.t(), out=part)
        if not needs_grad:
            loss += torch.ops.dist_llm.cross_entropy(part, targets[rows], ignore, z_loss)[0]
            continue
        loss += torch.ops.dist_llm.cross_entropy_grad_(part, targets[rows], ignore, z_loss)
        torch.mm(part, across.t(), out=dhidden[rows])
        # The product comes out in the dtype of hidden, and is added while its block is still in a cache.
        for first in range(0, vocab, block):
            columns = slice(first, min(first + block, vocab))
            product = torch.mm(part[:, columns].t(), hidden[rows])
            if adds:
                torch.ops.dist_llm.cross_entropy_add_(dweight[columns], product)
            else:
                dweight[columns] += product
    return loss.float(), dhidden, dweight


def _fake_linear(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore: int, z_loss: float, chunks: int, needs_grad: bool
) -> Tensors:
    del targets, ignore, z_loss, chunks
    dhidden = torch.empty_like(hidden) if needs_grad else hidden.new_empty(0)
    dweight = weight.new_empty(weight.shape if needs_grad else (0,), dtype=torch.float32)
    return _scalar(hidden), dhidden, dweight


class _Final(torch.autograd.Function):
    """Gradients that have none of their own: forward computed them, and the logits are gone."""

    @staticmethod
    def forward(ctx: Any, *grads: torch.Tensor) -> Tensors:
        del ctx
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        del ctx, grads
        raise RuntimeError(
            "linear_cross_entropy has no second derivative: forward computes its gradients and keeps no logits;"
            " use kernels.cross_entropy = reference, or linear_cross_entropy_reference"
        )


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.weight_dtype = inputs[1].dtype
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[1], output[2])
    # Without it zeros as large as the gradients would arrive for them.
    ctx.set_materialize_grads(False)


def _backward_linear(ctx: Any, dloss: torch.Tensor, ddhidden: None, ddweight: None) -> Grads:
    del ddhidden, ddweight
    dhidden, dweight = ctx.saved_tensors
    grads: Tensors = (dhidden * dloss, (dweight * dloss).to(ctx.weight_dtype))
    if torch.is_grad_enabled():
        # Asked for with create_graph: a second derivative of zero would be silently wrong.
        grads = _Final.apply(*(grad.detach().requires_grad_() for grad in grads))  # type: ignore[no-untyped-call]
    return *grads, None, None, None, None, None


torch.library.impl("dist_llm::linear_cross_entropy", "CompositeExplicitAutograd")(linear_forward)
torch.library.register_fake("dist_llm::linear_cross_entropy", _fake_linear)
torch.library.register_autograd("dist_llm::linear_cross_entropy", _backward_linear, setup_context=_save_linear)
torch.library.register_fake("dist_llm::cross_entropy", _fake)
torch.library.register_fake("dist_llm::cross_entropy_backward", _fake_backward)
torch.library.register_fake("dist_llm::cross_entropy_partials", _fake_partials)
torch.library.register_fake("dist_llm::cross_entropy_grad_", _fake_grad)
torch.library.register_fake("dist_llm::cross_entropy_add_", _fake_add)
torch.library.register_autograd("dist_llm::cross_entropy", _backward, setup_context=_save)


def cross_entropy_native(logits: torch.Tensor, targets: torch.Tensor, *, ignore: int, z_loss: float = 0.0) -> torch.Tensor:
    """``cross_entropy_reference`` in one pass over memory; ask ``why_not_native`` first, as ``select`` does.

    Args:
        logits: (..., V), fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
        targets: (...) int64, each ``ignore`` or in [0, V). Another one is an error on CPU; on CUDA, where finding out would stop the queue, the
            loss and the gradient of its row are NaN.
        ignore: marks a row that does not count.
        z_loss: weight of the square of lse.

    Returns:
        scalar fp32.

    Raises:
        RuntimeError: a shape or a dtype is none of these, or (on CPU) a target is out of range; the message names it.
    """
    rows = logits.flatten(0, -2).contiguous()
    loss: torch.Tensor = torch.ops.dist_llm.cross_entropy(rows, targets.flatten().contiguous(), ignore, z_loss)[0]
    return loss


def cross_entropy_partials_native(
    logits: torch.Tensor, targets: torch.Tensor, *, ignore: int, vocab_start: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``cross_entropy_partials_reference`` in one pass over memory. Not differentiable.

    Args:
        logits: (N, V), fp32 or bf16 (CUDA: fp16 too): columns ``vocab_start`` to ``vocab_start + V`` of the whole; copied when not contiguous.
        targets: (N,) int64 in the whole vocabulary, or ``ignore``.
        ignore: marks a row that does not count.
        vocab_start: first column at hand.

    Returns:
        row_max, row_sum, target_logit, each (N,) fp32.

    Raises:
        RuntimeError: a shape or a dtype is none of these, or (on CPU) a target is out of range; the message names it.
    """
    row_max, row_sum, target_logit = torch.ops.dist_llm.cross_entropy_partials(
        logits.detach().contiguous(), targets.contiguous(), ignore, vocab_start
    )
    return row_max, row_sum, target_logit


def cross_entropy_backward_native(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    *,
    ignore: int,
    z_loss: float = 0.0,
    vocab_start: int = 0,
) -> torch.Tensor:
    """``cross_entropy_backward_reference`` in one pass over memory.

    Args:
        dloss: scalar fp32, gradient of the summed loss.
        logits: (N, V), fp32 or bf16 (CUDA: fp16 too); copied when not contiguous.
        targets: (N,) int64 in the whole vocabulary, or ``ignore``.
        row_max: (N,) fp32, over all columns of all ranks.
        row_sum: (N,) fp32, over all columns of all ranks.
        ignore: marks a row that does not count.
        z_loss: weight of lse^2 in the loss.
        vocab_start: first column at hand.

    Returns:
        (N, V), dtype of logits.

    Raises:
        RuntimeError: a shape or a dtype is none of these, or (on CPU) a target is out of range; the message names it.
    """
    dlogits: torch.Tensor = torch.ops.dist_llm.cross_entropy_backward(
        dloss, logits.detach().contiguous(), targets.contiguous(), row_max, row_sum, ignore, z_loss, vocab_start
    )
    return dlogits


def linear_cross_entropy_native(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, ignore: int, z_loss: float = 0.0, chunks: int = 16
) -> torch.Tensor:
    """``linear_cross_entropy_reference`` that never holds more than 1 / ``chunks`` of the logits, or one row of them.

    Forward computes the gradients as well where they are wanted, and keeps those of ``hidden`` and, in fp32, of ``weight``. There is no
    second derivative.

    Args:
        hidden: (..., D), fp32 or bf16 (CUDA: fp16 too); copied when it is not contiguous.
        weight: (V, D), dtype of hidden or fp32; copied when it is not contiguous.
        targets: (...) int64, each ``ignore`` or in [0, V).
        ignore: marks a row that does not count.
        z_loss: weight of the square of lse.
        chunks: parts that the rows are divided into.

    Returns:
        scalar fp32.

    Raises:
        ValueError: chunks is less than 1.
        RuntimeError: a shape or a dtype is none of these, or (on CPU) a target is out of range; the message names it.
    """
    if chunks < 1:
        raise ValueError(f"linear_cross_entropy: chunks ({chunks}) must be at least 1")
    rows = hidden.flatten(0, -2).contiguous()
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: torch.Tensor = torch.ops.dist_llm.linear_cross_entropy(
        rows, weight.contiguous(), targets.flatten().contiguous(), ignore, z_loss, chunks, needs_grad
    )[0]
    return loss
