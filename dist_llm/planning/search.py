"""The fastest layouts of a run on a number of devices, out of all that are legal and fit: the answer of brute force, found by bounds.

The space is tp x pp x cp x dp = devices, with experts over ep of a stage's ranks, ZeRO 0 to 3, every micro-batch size that divides a
rank's rows, three kinds of recomputation, and 1F1B or interleaved chunks that divide a stage's layers evenly. What is left out without
being looked at is left out for one of three reasons, each of which is checked against ``brute.py``:

- the trainer's rules refuse a part of it whatever the rest is (heads not divisible by tp, a pipeline with ZeRO-3);
- it does not fit with one row a micro-batch, which needs least (or its masters and moments alone do not fit);
- what its step takes at least (``bounds.py``) is longer than enough layouts already found.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field, replace
from operator import itemgetter

from dist_llm.planning.bounds import STATE_BYTES, state_bound, step_bounds
from dist_llm.planning.cluster import Cluster
from dist_llm.planning.count_shapes import shape_params
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.rank_memory import RankBytes, memory_of
from dist_llm.planning.saving import AUTO, Kernels, Saving, saving_of
from dist_llm.planning.shapes import ModelShape
from dist_llm.planning.space import RECOMPUTE, Refusal, Space, layout_key
from dist_llm.planning.step_time import StepTime
from dist_llm.planning.trainer_step import trainer_step

__all__ = ["Plan", "Search"]

_ROUNDING = 1e-9  # relative: the bound and the step add the same numbers in another order


@dataclass(frozen=True)
class Plan:
    """A layout that is legal and fits, with what it costs."""

    layout: LayoutShape
    step: StepTime
    memory: RankBytes  # of the fullest stage
    saving: Saving  # what the layers save on these devices

    @property
    def key(self) -> tuple[object, ...]:
        """Order of plans: the faster, then the smaller, then the simpler one."""
        return (self.step.total_s, self.memory.total, layout_key(self.layout))


@dataclass
class Search:
    """The layouts of ``model`` on ``gpus`` devices of ``cluster``, ``batch_size`` rows a step.

    ``limit_bytes``: memory of a device; default the cluster's. ``kernels``: what the run asks for; what is left to auto is what a run on these devices takes.
    """

    model: ModelShape
    gpus: int
    cluster: Cluster
    batch_size: int
    precision: str = "bf16"
    limit_bytes: float | None = None
    kernels: Kernels = AUTO
    evaluated: int = field(default=0, init=False)  # steps timed

    def __post_init__(self) -> None:
        if self.limit_bytes is None:
            self.limit_bytes = self.cluster.memory_bytes
        self._count = shape_params(self.model)
        self._saving = saving_of(self.kernels, self.model, self.cluster.kind, self.precision)
        self.space = Space(self.model, self.gpus, self.batch_size, self.precision)
        self._memory: dict[LayoutShape, RankBytes] = {}
        self._plans: dict[LayoutShape, Plan | None] = {}
        self._legal: dict[LayoutShape, bool] = {}
        self._divisions = self.space.divisions
        self._least: list[float | None] = [None] * len(self._divisions)
        self._fits: list[bool | None] = [None] * len(self._divisions)
        self._states = [state_bound(self.model, self._count, layout, self.precision) for layout in self._divisions]
        bounds = step_bounds(
            self.model,
            self._divisions,
            self.cluster,
            gpus=self.gpus,
            batch_size=self.batch_size,
            precision=self.precision,
            limit_bytes=self.limit_bytes,
        )
        self._candidates = sorted(bounds, key=itemgetter(0))

    def best(self, keep: int = 1, *, under_bytes: float | None = None, distinct: bool = False) -> list[Plan]:
        """The ``keep`` fastest plans, fastest first; fewer where there are fewer.

        under_bytes: only plans that need less than this. distinct: one plan for each division over tp, pp, cp and ep, the others
        being variations of it.
        """
        assert self.limit_bytes is not None
        if STATE_BYTES * self._count.total / self.gpus > self.limit_bytes:
            return []  # however masters and moments are divided, the fullest device has its part of them
        ranking: list[Plan] = []
        for bound, number, micro_batch, again in self._candidates:
            if len(ranking) >= keep and bound * (1 - _ROUNDING) > ranking[keep - 1].step.total_s:
                break
            if not self._may_fit(number, under_bytes):
                continue
            layout = replace(self._divisions[number], micro_batch=micro_batch, recompute=RECOMPUTE[again])
            plan = self._plan(layout, under_bytes)
            if plan is None or (len(ranking) >= keep and plan.key > ranking[-1].key) or not self._is_legal(layout):
                continue
            if distinct:
                rival = next((p for p in ranking if _axes(p.layout) == _axes(layout)), None)
                if rival is not None and rival.key <= plan.key:
                    continue
                if rival is not None:
                    ranking.remove(rival)
            insort(ranking, plan, key=lambda p: p.key)
            del ranking[keep:]
        return ranking

    @property
    def divisions(self) -> int:
        """Ways to divide the run over ranks that the rules allow."""
        return len(self._divisions)

    def memory_refusal(self) -> tuple[Refusal | None, float | None]:
        """(the divisions that do not fit even with one row a micro-batch, what the smallest division of all needs in bytes)."""
        assert self.limit_bytes is not None
        needed = [self._least_bytes(number) for number in range(len(self._divisions))]
        if not needed:
            return None, None
        beyond = [number for number, least in enumerate(needed) if least > self.limit_bytes]
        if not beyond:
            return None, min(needed)
        closest = min(beyond, key=needed.__getitem__)
        message = f"memory: needs {needed[closest] / 1e9:.1f} GB, has {self.limit_bytes / 1e9:.1f} GB"
        excess = needed[closest] - self.limit_bytes
        return Refusal("memory", "memory", len(beyond), self._divisions[closest], message, excess), min(needed)

    def _may_fit(self, number: int, under_bytes: float | None) -> bool:
        assert self.limit_bytes is not None
        if under_bytes is not None:
            return self._least_bytes(number) < under_bytes
        fits = self._fits[number]
        if fits is None:
            # Full recomputation nearly always needs least, and one that fits is enough.
            layout, limit = self._divisions[number], self.limit_bytes
            fits = self._fits[number] = self._states[number] <= limit and any(
                self._bytes(replace(layout, recompute=recompute)).total <= limit for recompute in reversed(RECOMPUTE)
            )
        return fits

    def _least_bytes(self, number: int) -> float:
        # With one row, and the recomputation that needs least: for stages of one layer that is none.
        least = self._least[number]
        if least is None:
            layout = self._divisions[number]
            least = self._least[number] = min(self._bytes(replace(layout, recompute=recompute)).total for recompute in RECOMPUTE)
        return least

    def _plan(self, layout: LayoutShape, under_bytes: float | None) -> Plan | None:
        assert self.limit_bytes is not None
        if layout in self._plans:
            plan = self._plans[layout]
            return plan if plan is None or under_bytes is None or plan.memory.total < under_bytes else None
        memory = self._bytes(layout)
        if memory.total > self.limit_bytes:
            self._plans[layout] = None
            return None
        if under_bytes is not None and memory.total >= under_bytes:
            return None
        self.evaluated += 1
        plan = self._plans[layout] = Plan(layout, trainer_step(self.model, layout, self.cluster), memory, self._saving)
        return plan

    def _is_legal(self, layout: LayoutShape) -> bool:
        # The parts were legal; a rule that joins them in a way the space does not know is still obeyed.
        known = self._legal.get(layout)
        if known is None:
            known = self._legal[layout] = self.space.allows(layout)
        return known

    def _bytes(self, layout: LayoutShape) -> RankBytes:
        memory = self._memory.get(layout)
        if memory is None:
            memory = self._memory[layout] = memory_of(self.model, layout, precision=self.precision, saving=self._saving)
        return memory


def _axes(layout: LayoutShape) -> tuple[int, ...]:
    return (layout.tp, layout.pp, layout.cp, layout.ep)
