"""What every part of the model puts out, as one number each: so that a forward that is wrong is named by its first wrong part.

A loss that differs says nothing about where; gradients are then all different. The sum of squares of each part's output is
cheap, does not depend on how tokens are spread over ranks, and can be added up over them.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dist_llm.comm.collectives import all_reduce_sum
from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import RunConfig
from dist_llm.models.block import Block, Places
from dist_llm.models.decoder import Decoder

__all__ = ["OutputSums", "part_names"]

_OF_BLOCK = ("attention_norm", "attention", "attention_dropout", "mlp_norm", "mlp", "mlp_dropout")


def part_names(config: RunConfig) -> list[str]:
    """Logical names of the parts that are watched, in forward order: each leaves a (B, T, D) of the residual stream's form."""
    blocks = [f"blocks.{number}.{part}" for number in range(config.model.num_layers) for part in _OF_BLOCK]
    return ["embedding", "positions", "embedding_dropout", *blocks, "final_norm"]


class OutputSums:
    """Watches the parts of every ``Decoder`` that computes while it is entered.

    Hooks on all modules, not on a given model: an engine may have wrapped the model, or hold several parts of it.
    """

    def __init__(self, config: RunConfig, ctx: ParallelContext) -> None:
        self._ctx = ctx
        self._names = part_names(config)
        self._sequence = config.parallel.sequence_parallel
        self._known: dict[nn.Module, str] = {}
        self._samples: tuple[int, ...] = ()
        self._sums: dict[tuple[str, tuple[int, ...]], float] = {}

    def __enter__(self) -> OutputSums:
        self._hooks = (register_module_forward_pre_hook(self._before), register_module_forward_hook(self._after))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def of_step(self) -> dict[str, float]:
        """Sums over the global batch since the last call, by name; every rank calls this. Parts that did not compute are left out."""
        own = dict.fromkeys(self._names, 0.0)
        for (name, _), value in self._sums.items():
            own[name] += value
        self._sums.clear()
        # Without sequence parallelism every tensor-parallel rank has the same output: the mean also shows a rank that has another.
        copies = 1 if self._sequence else self._ctx.tp.size
        total = all_reduce_sum([value / copies for value in own.values()], self._ctx.world, self._ctx.device)
        return {name: value for name, value in zip(own, total, strict=True) if value != 0.0}

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, Decoder) and module not in self._known:
            self._known |= {part: name for name, part in module.named_modules() if name in self._names}
            self._known[module] = ""
        elif isinstance(module, Block):
            places: Places = args[1]
            self._samples = () if places.samples is None else tuple(places.samples.tolist())

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = self._known.get(module, "")
        if not name:
            return
        # A norm that also adds to the residual stream gives that sum as well.
        normed = output[0] if isinstance(output, tuple) else output
        value = float(normed.detach().double().square().sum())
        if name.startswith("blocks."):
            # Recomputation in backward comes by a second time; what counts is what the loss was computed from.
            self._sums.setdefault((name, self._samples), value)
        else:
            self._sums[name, ()] = self._sums.get((name, ()), 0.0) + value
