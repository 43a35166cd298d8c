"""AdamW in C++ and CUDA: schemas and shapes without data. The device code is in csrc/adamw/.

One pass over memory does what clipping, the update and the cast of the parameters do in three. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_llm.kernels.adamw.reference import check_lists
from dist_llm.kernels.extension import why_no_kernel

__all__ = ["adamw_step_native", "global_sum_of_squares_native", "why_not_native"]

torch.library.define(
    "dist_llm::adamw_step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] copies, Tensor grad_scale,"
    " float lr, float beta1, float beta2, float eps, float weight_decay, float step) -> ()",
)
torch.library.define("dist_llm::sum_of_squares", "(Tensor[] tensors) -> Tensor")


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot run, or None. Loads the extension at the first call.

    Args:
        device: of the parameters.
        dtype: of gradients and copies; parameters and moments are always fp32.
    """
    return why_no_kernel("adamw_step", device, dtype)


def _fake_step(*arguments: object) -> None:
    del arguments


def _fake_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)


torch.library.register_fake("dist_llm::adamw_step", _fake_step)
torch.library.register_fake("dist_llm::sum_of_squares", _fake_sum)


@torch.no_grad()
def adamw_step_native(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: float,
    grad_scale: torch.Tensor | float = 1.0,
    copies: Sequence[torch.Tensor] | None = None,
) -> None:
    """``adamw_step_reference`` in one pass over memory; ask ``why_not_native`` first, as ``select`` does.

    Args: as ``adamw_step_reference``, with
        params, exp_avgs, exp_avg_sqs: fp32; what is not contiguous is copied and written back.
        grads: fp32 or bf16 (CUDA: fp16 too), all alike.
        grad_scale: a tensor is read on the device, in fp32: nothing waits for it.
        copies: bf16 (CUDA: or fp16), all alike.

    Raises:
        ValueError: the lists do not belong together.
    """
    copies = () if copies is None else copies
    check_lists(params, grads, exp_avgs, exp_avg_sqs, copies or None)
    if not params:
        return
    if isinstance(grad_scale, torch.Tensor):
        scale = grad_scale.to(torch.float32)
    else:
        scale = torch.full((), grad_scale, dtype=torch.float32, device=params[0].device)
    changed = [list(tensors) for tensors in (params, exp_avgs, exp_avg_sqs, copies)]
    in_order = [[t.contiguous() for t in tensors] for tensors in changed]
    torch.ops.dist_llm.adamw_step(
        in_order[0], [g.contiguous() for g in grads], *in_order[1:], scale, lr, beta1, beta2, eps, weight_decay, float(step)
    )
    for tensors, written in zip(changed, in_order, strict=True):
        for tensor, result in zip(tensors, written, strict=True):
            if not tensor.is_contiguous():
                tensor.copy_(result)
    if not torch.compiler.is_compiling():
        # An op of ours does not tell autograd that it wrote; a graph that saved an old value must find out.
        torch.autograd.graph.increment_version([t for tensors in changed for t in tensors])


@torch.no_grad()
def global_sum_of_squares_native(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """``global_sum_of_squares_reference`` in one pass over memory, in fp64 throughout, in an order that depends on the sizes alone.

    Args:
        tensors: at least one, of any shapes, fp32 or bf16 (CUDA: fp16 too), on one device; copied where not contiguous.

    Returns:
        scalar fp64.

    Raises:
        ValueError: there are no tensors, and therefore no device.
    """
    if not tensors:
        raise ValueError("global_sum_of_squares needs at least one tensor: an empty list has no device")
    total: torch.Tensor = torch.ops.dist_llm.sum_of_squares([t.contiguous() for t in tensors])
    return total
