"""AdamW that clips, updates and rounds in one pass over memory, with the state of torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from dist_llm.kernels.adamw.reference import AdamWStepFn, adamw_step_torch

__all__ = ["FusedAdamW"]


class FusedAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` with an ``adamw_step`` of ours.

    Parameter groups, state (``step``, ``exp_avg``, ``exp_avg_sq``) and ``state_dict`` are torch's: a checkpoint of either loads in the other.
    The step count stays on the CPU, where its bias corrections are computed: no step waits for a device.

    Args:
        params: parameters or groups of them, as for ``torch.optim.AdamW``; fp32, unless ``adamw_step`` takes others.
        lr: rate.
        betas: decay of both moments.
        eps: added to the root of the second.
        weight_decay: decoupled decay.
        adamw_step: an implementation of ``kernels/adamw``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        adamw_step: AdamWStepFn = adamw_step_torch,
    ) -> None:
        # fused=True: what torch does with the groups of a checkpoint of ours.
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._adamw_step = adamw_step
        # It is how a GradScaler asks an optimiser to scale by itself, in a way that ours does not know.
        self._step_supports_amp_scaling = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called after a state was loaded.

        Raises:
            ValueError: it belongs to a variant of AdamW that this is not.
        """
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            for option in ("amsgrad", "maximize", "capturable", "differentiable"):
                if group[option]:
                    raise ValueError(f"the loaded state is of an AdamW with {option}=True, which FusedAdamW does not compute")

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: torch.Tensor | float = 1.0,
        copies: Mapping[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss, and is called first.
            grad_scale: 0-dim tensor on the device of the parameters, or number, that multiplies every gradient: the factor of clipping.
            copies: parameter -> its copy in a dtype of activations, which gets the rounded new value in the same pass. A parameter without a
                gradient takes that of its copy. With any, all parameters that are updated have one.

        Returns:
            what ``closure`` returned.

        Raises:
            ValueError: a gradient is sparse, or a parameter has no copy where others have.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for step, parts in self._lists_of(group, copies).items():
                beta1, beta2 = group["betas"]
                self._adamw_step(
                    *parts[:4],
                    lr=float(group["lr"]),
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=step[0],
                    grad_scale=grad_scale,
                    copies=None if copies is None else parts[4],
                )
        return loss

    def _lists_of(
        self, group: dict[str, Any], copies: Mapping[torch.Tensor, torch.Tensor] | None
    ) -> dict[tuple[float, torch.device, torch.dtype], list[list[torch.Tensor]]]:
        """Parameters, gradients, both moments and copies by what one call of ``adamw_step`` has in common; steps are counted here."""
        lists: dict[tuple[float, torch.device, torch.dtype], list[list[torch.Tensor]]] = {}
        for param in group["params"]:
            grad = param.grad
            if grad is None and copies is not None and param in copies:
                grad = copies[param].grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise ValueError(f"FusedAdamW: the gradient of a parameter {tuple(param.shape)} is sparse; it takes dense ones")
            if copies is not None and param not in copies:
                raise ValueError(f"FusedAdamW: a parameter {tuple(param.shape)} has no copy, others have")
            state = self.state[param]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            if state["step"].device.type != "cpu":  # loaded from, or put there by, someone who keeps it on the device
                state["step"] = state["step"].cpu()
            state["step"] += 1
            parts = lists.setdefault((state["step"].item(), param.device, grad.dtype), [[], [], [], [], []])
            found = (param, grad, state["exp_avg"], state["exp_avg_sq"], *(() if copies is None else (copies[param],)))
            for tensors, tensor in zip(parts, found, strict=copies is not None):
                tensors.append(tensor)
        return lists
