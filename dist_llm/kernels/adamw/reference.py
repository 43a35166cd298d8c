"""AdamW in plain PyTorch: the definition (Loshchilov and Hutter, arXiv:1711.05101), and torch's own fused kernel behind the same call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch.optim.adamw import adamw

__all__ = [
    "AdamWStepFn",
    "SumOfSquaresFn",
    "adamw_step_reference",
    "adamw_step_torch",
    "check_lists",
    "global_sum_of_squares_reference",
]

# Gradients that adamw_step_torch scales at a time: they are copies, and 64 MiB of them are enough for a kernel to be busy with.
PART_ELEMENTS = 1 << 24


class AdamWStepFn(Protocol):
    """An implementation of AdamW, with the arguments of ``adamw_step_reference``."""

    def __call__(
        self,
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
        grad_scale: torch.Tensor | float = ...,
        copies: Sequence[torch.Tensor] | None = ...,
    ) -> None:
        """One step, in place."""
        ...


class SumOfSquaresFn(Protocol):
    """An implementation of ``global_sum_of_squares_reference``."""

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum over all elements of all tensors."""
        ...


def check_lists(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    copies: Sequence[torch.Tensor] | None,
) -> None:
    """Refuse lists that do not belong together.

    Raises:
        ValueError: naming the list, the position and both shapes.
    """
    named = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, **({} if copies is None else {"copies": copies})}
    for name, tensors in named.items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw_step: {name} has {len(tensors)} tensors for {len(params)} params")
        for index, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor.shape != param.shape:
                raise ValueError(
                    f"adamw_step: {name}[{index}] {tuple(tensor.shape)} must have the shape of params[{index}] {tuple(param.shape)}"
                )


@torch.no_grad()
def adamw_step_reference(
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
    """One step of AdamW with decoupled decay, in place; lists have one tensor for each parameter.

    Args:
        params: any shapes, fp32: the masters. fp64 is computed in fp64: tests measure errors against it.
        grads: like params, fp32 or a dtype of activations.
        exp_avgs: running mean of the gradients, like params.
        exp_avg_sqs: running mean of their squares, like params.
        lr: rate of this step.
        beta1: decay of ``exp_avgs``.
        beta2: decay of ``exp_avg_sqs``.
        eps: added to the root of the corrected mean square.
        weight_decay: a parameter shrinks by lr * weight_decay of itself.
        step: 1 for the first step: the means start at zero, and are divided by what is missing from them.
        grad_scale: 0-dim tensor or number that multiplies every gradient first: the factor of clipping.
        copies: like params in a dtype of activations: they get the new parameters, rounded.

    Raises:
        ValueError: the lists do not belong together.
    """
    check_lists(params, grads, exp_avgs, exp_avg_sqs, copies)
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        g = grad.to(torch.promote_types(param.dtype, torch.float32)) * grad_scale
        param.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(g, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
        param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    for copy, param in zip(copies or (), params, strict=copies is not None):
        copy.copy_(param)


def _parts(params: Sequence[torch.Tensor]) -> Iterator[slice]:
    """Runs of parameters whose scaled gradients exist at the same time."""
    first, size = 0, 0
    for index, param in enumerate(params):
        if size > 0 and size + param.numel() > PART_ELEMENTS:
            yield slice(first, index)
            first, size = index, 0
        size += param.numel()
    if params:
        yield slice(first, len(params))


@torch.no_grad()
def adamw_step_torch(
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
    """``adamw_step_reference`` by torch's fused AdamW, with a pass over the gradients before it and one over the copies after it.

    Args: as ``adamw_step_reference``.

    Raises:
        ValueError: the lists do not belong together.
    """
    check_lists(params, grads, exp_avgs, exp_avg_sqs, copies)
    is_scaled = isinstance(grad_scale, torch.Tensor) or grad_scale != 1.0
    for part in _parts(params):
        wide = [_laid_like(param, grad.to(param.dtype)) for grad, param in zip(grads[part], params[part], strict=True)]
        kept = (exp_avgs[part], exp_avg_sqs[part])
        moments = [[_laid_like(param, m) for param, m in zip(params[part], lists, strict=True)] for lists in kept]
        adamw(
            list(params[part]),
            [grad * grad_scale for grad in wide] if is_scaled else wide,
            moments[0],
            moments[1],
            [],
            # It counts the step itself.
            [torch.full((), step - 1, dtype=torch.float32, device=param.device) for param in params[part]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
        for moment, laid in zip((*kept[0], *kept[1]), (*moments[0], *moments[1]), strict=True):
            if laid is not moment:
                moment.copy_(laid)
    for copy, param in zip(copies or (), params, strict=copies is not None):
        copy.copy_(param)


def _laid_like(param: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in memory as ``param`` lies there: torch's fused AdamW goes through both as if they did, and says nothing where they do not."""
    sizes = param.shape
    if all(size == 1 or a == b for size, a, b in zip(sizes, param.stride(), tensor.stride(), strict=True)) or tensor.numel() == 0:
        return tensor
    return torch.empty_strided(param.shape, param.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@torch.no_grad()
def global_sum_of_squares_reference(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all elements: the square of the global norm.

    Args:
        tensors: at least one, of any shapes and floating dtypes, on one device.

    Returns:
        scalar fp64.

    Raises:
        ValueError: there are no tensors, and therefore no device.
    """
    if not tensors:
        raise ValueError("global_sum_of_squares needs at least one tensor: an empty list has no device")
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()
