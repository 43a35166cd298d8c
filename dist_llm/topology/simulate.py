"""A pipeline's timeline from the orders of its stages and the cost of their actions.

An event graph: a forward waits for the forward of the virtual stage before it, a backward for the backward of the one after
(the last virtual stage's for its own forward), the weights' half of a backward for the input's half, and every action for the
one before it on its stage. An action starts when the last of these is done; orders that wait for one another are found out.
Linear in the number of actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_llm.topology.schedule import Action

__all__ = ["Timeline", "simulate"]

NOTHING = -1  # the index an action waits for when it waits for no other stage


@dataclass(frozen=True)
class Timeline:
    """When each stage computes what. Times are in the unit of the costs, from the start of the step."""

    orders: Sequence[Sequence[Action]]  # by stage
    starts: Sequence[Sequence[float]]  # by stage, then by position in the stage's order
    ends: Sequence[Sequence[float]]

    @property
    def makespan(self) -> float:
        """End of the last action."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0)

    @property
    def busy(self) -> list[float]:
        """Time each stage computes."""
        return [sum(end - start for start, end in zip(*stage, strict=True)) for stage in zip(self.starts, self.ends, strict=True)]

    @property
    def bubble(self) -> float:
        """Part of stages x makespan in which nothing is computed; 0 for a step that takes no time."""
        whole = len(self.orders) * self.makespan
        return 1.0 - sum(self.busy) / whole if whole > 0 else 0.0


def simulate(orders: Sequence[Sequence[Action]], cost: Callable[[int, Action], float], *, transfer: float = 0.0) -> Timeline:
    """The timeline of all stages together, each in its own order, each action as early as what it waits for allows.

    orders: the actions of each stage. cost: (stage, action) -> duration. transfer: time an activation or a gradient is on its
    way from one stage to the next, while neither is held up; the unit is the cost's. Raises ``ValueError`` for a negative
    duration, an action that a stage has twice, and orders that never end, naming each stage that waits and at which action.
    """
    if transfer < 0:
        raise ValueError(f"a transfer between pipeline stages cannot take {transfer}: durations start at 0")
    num_stages = len(orders)
    num_virtual = num_stages * (1 + max((action.chunk for order in orders for action in order), default=0))
    num_micro = 1 + max((action.micro for order in orders for action in order), default=0)
    # When each action ended, flat by (forward 0, backward or its input half 1, weights' half 2), virtual stage, micro-batch.
    table = num_virtual * num_micro
    slots = {"F": 0, "B": table, "I": table, "W": 2 * table}
    done: list[float | None] = [None] * (3 * table)
    last = table - num_micro  # where the last virtual stage's micro-batches begin
    sleepers: dict[int, int] = {}  # what is waited for -> the stage that waits
    starts: list[list[float]] = [[] for _ in orders]
    ends: list[list[float]] = [[] for _ in orders]

    awake = list(range(num_stages))
    while awake:
        stage = awake.pop()
        order, my_starts, my_ends = orders[stage], starts[stage], ends[stage]
        now = my_ends[-1] if my_ends else 0.0
        while len(my_ends) < len(order):
            action = order[len(my_ends)]
            kind, micro, chunk = action
            here = (chunk * num_stages + stage) * num_micro + micro
            slot = slots[kind]
            if kind == "F":
                wanted, way = (here - num_micro if here >= num_micro else NOTHING), transfer
            elif kind == "W":
                wanted, way = table + here, 0.0
            elif here >= last:
                wanted, way = here, 0.0
            else:
                wanted, way = table + here + num_micro, transfer
            start = now
            if wanted != NOTHING:
                arrived = done[wanted]
                if arrived is None:
                    sleepers[wanted] = stage
                    break
                # Chunks of one rank alone follow each other without leaving it.
                if num_stages > 1:
                    arrived += way
                if arrived > start:
                    start = arrived
            if done[slot + here] is not None:
                raise ValueError(f"pipeline stage {stage} has {action} twice in its order")
            duration = cost(stage, action)
            if duration < 0:
                raise ValueError(f"pipeline stage {stage}'s {action} cannot take {duration}: durations start at 0")
            now = start + duration
            done[slot + here] = now
            my_starts.append(start)
            my_ends.append(now)
            if (waiting := sleepers.pop(slot + here, None)) is not None:
                awake.append(waiting)

    if stuck := [stage for stage in range(num_stages) if len(ends[stage]) < len(orders[stage])]:
        where = ", ".join(f"stage {stage} at {orders[stage][len(ends[stage])]}" for stage in stuck)
        raise ValueError(f"the orders of these pipeline stages wait for one another for ever: {where}")
    return Timeline(orders, starts, ends)
