"""The legal ways to divide a run over devices, found from divisors, and the reasons why others are not.

A rule that refuses a part (tp heads cannot share, a pipeline with ZeRO-3) refuses it whatever the rest is: parts are asked about once
each, and only what all of its parts allow is put together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.legality import Legality
from dist_llm.planning.shapes import ModelShape

__all__ = ["RECOMPUTE", "Recompute", "Refusal", "Space", "divisors", "layout_key"]

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass
class Refusal:
    """Layouts left out for one reason: how many divisions over ranks, the first reason in words, and a layout."""

    kind: str  # "rule" or "memory"
    key: str
    count: int
    example: LayoutShape
    message: str
    excess_bytes: float = 0.0  # memory: what the closest one lacks


def layout_key(layout: LayoutShape) -> tuple[int, ...]:
    """Order of layouts that are equally good: the one that divides less comes first."""
    again = RECOMPUTE.index(layout.recompute)
    return (layout.pp, layout.tp, layout.cp, layout.ep, layout.virtual_pp, layout.zero, layout.micro_batch, again)


class Space:
    """Divisions of ``model``, ``batch_size`` rows a step, over ``gpus`` devices.

    divisions: tp, pp, cp, dp, ep, ZeRO stage and number of chunks, with one row a micro-batch and nothing recomputed; the numbers of
    chunks of one division follow one another, one chunk first. refusals: by the key at fault.
    """

    def __init__(self, model: ModelShape, gpus: int, batch_size: int, precision: str) -> None:
        self.model, self.gpus, self.batch_size, self.precision = model, gpus, batch_size, precision
        self.refusals: dict[str, Refusal] = {}
        self._legality = Legality(model, batch_size, precision)
        self._parts: dict[LayoutShape, bool] = {}
        self.divisions = list(self._legal_divisions())

    def allows(self, layout: LayoutShape) -> bool:
        """Whether the trainer would run ``layout``; if not, the reason is remembered."""
        reason = self._legality.refusal(layout)
        if reason is not None:
            self._refuse(reason, layout)
        return reason is None

    def _legal_divisions(self) -> Iterator[LayoutShape]:
        plain = LayoutShape(global_batch=self.batch_size, precision=self.precision, zero=1, sequence_parallel=False)
        for tp in divisors(self.gpus):
            if not self._allowed(replace(plain, tp=tp)):
                continue
            for cp in divisors(self.gpus // tp):
                whole = replace(plain, tp=tp, cp=cp, sequence_parallel=self._splits_sequence(tp, cp))
                if not self._allowed(whole):
                    continue
                for pp in divisors(self.gpus // (tp * cp)):
                    dp = self.gpus // (tp * cp * pp)
                    if not self._allowed(replace(plain, pp=pp)) or not self._allowed(replace(plain, dp=dp)):
                        continue
                    yield from self._variants(replace(whole, pp=pp, dp=dp))

    def _variants(self, layout: LayoutShape) -> Iterator[LayoutShape]:
        for zero in range(4):
            if not self._allowed(LayoutShape(pp=layout.pp, zero=zero, global_batch=self.batch_size)):
                continue
            for ep in divisors(self.model.num_experts) if self.model.num_experts else (1,):
                if (layout.tp * layout.cp * layout.dp) % ep == 0:
                    for chunks in self._chunks(layout):
                        yield replace(layout, zero=zero, virtual_pp=chunks, ep=ep)

    def _splits_sequence(self, tp: int, cp: int) -> bool:
        # Norms and residuals are divided over tp wherever the row allows it: the same traffic, less memory.
        return tp > 1 and self.model.seq_len % (tp * cp) == 0

    def _chunks(self, layout: LayoutShape) -> Iterator[int]:
        yield 1
        if layout.pp == 1 or self.model.num_layers % layout.pp or (self.batch_size // layout.dp) % layout.pp:
            return
        yield from divisors(self.model.num_layers // layout.pp)[1:]

    def _allowed(self, part: LayoutShape) -> bool:
        known = self._parts.get(part)
        if known is None:
            known = self._parts[part] = self.allows(part)
        return known

    def _refuse(self, message: str, layout: LayoutShape) -> None:
        key = message.partition(":")[0]
        known = self.refusals.get(key)
        if known is None:
            self.refusals[key] = Refusal("rule", key, 1, layout, message)
        else:
            known.count += 1


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """Divisors of ``number``, smallest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return (*small, *(number // n for n in reversed(small) if n * n != number))
