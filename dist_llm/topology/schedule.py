"""In which order a pipeline stage computes its micro-batches.

An order is a list of actions for each stage; that the lists of all stages fit together, and how long they take, is what
``topology/simulate.py`` answers. With ``num_chunks`` v > 1 a stage holds v parts of the model, and virtual stage
chunk * num_stages + stage follows virtual stage chunk * num_stages + stage - 1: the micro-batch goes round v times.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["SCHEDULES", "Action", "Kind", "bubble_fraction", "interleaved", "one_f_one_b", "orders", "peak_in_flight", "zero_bubble"]

# F forward, B backward; I and W are the halves of a backward: gradient of the input, gradient of the weights.
Kind = Literal["F", "B", "I", "W"]

SCHEDULES = ("1f1b", "interleaved", "zero_bubble")


class Action(NamedTuple):
    """One computation of one stage."""

    kind: Kind
    micro: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.micro}" + (f".{self.chunk}" if self.chunk else "")


def one_f_one_b(num_stages: int, num_micro: int, stage: int) -> list[Action]:
    """1F1B: forwards until the first gradient can have come back, then a forward and a backward in turn, then the rest.

    Stage s holds at most min(num_micro, num_stages - s) micro-batches at once (Narayanan et al., arXiv:2006.09503; the flush
    at the end of a step as in arXiv:2104.04473, section 2.2). Any num_micro from 1 up.
    """
    _check(num_stages, num_micro, stage)
    warmup = min(num_stages - 1 - stage, num_micro)
    order = [Action("F", micro) for micro in range(warmup)]
    for micro in range(num_micro - warmup):
        order.append(Action("F", warmup + micro))
        order.append(Action("B", micro))
    order.extend(Action("B", micro) for micro in range(num_micro - warmup, num_micro))
    return order


def interleaved(num_stages: int, num_micro: int, num_chunks: int, stage: int) -> list[Action]:
    """Interleaved 1F1B: micro-batches in rounds of num_stages, each round through chunk 0, then chunk 1, and so on.

    The order of Megatron-LM (arXiv:2104.04473, section 2.2): 2 * (num_stages - 1 - stage) + (num_chunks - 1) * num_stages
    forwards first, then a forward and a backward in turn; backwards take the chunks from the last to the first.
    Raises ``ValueError`` unless num_micro is divisible by num_stages and there are two chunks or more.
    """
    _check(num_stages, num_micro, stage)
    if num_chunks < 2:
        raise ValueError(f"schedule interleaved needs at least 2 chunks a stage, got {num_chunks}; with one chunk use 1f1b")
    if num_micro % num_stages != 0:
        raise ValueError(
            f"schedule interleaved needs micro-batches in rounds of the pipeline's stages: {num_micro} micro-batches are not "
            f"divisible by {num_stages} stages; change the number of micro-batches or use 1f1b"
        )
    per_round = num_stages * num_chunks
    forwards: list[Action] = []
    backwards: list[Action] = []
    for start in range(0, num_micro, num_stages):
        for chunk in range(num_chunks):
            forwards.extend(Action("F", micro, chunk) for micro in range(start, start + num_stages))
            backwards.extend(Action("B", micro, num_chunks - 1 - chunk) for micro in range(start, start + num_stages))
    warmup = min(2 * (num_stages - 1 - stage) + per_round - num_stages, len(forwards))
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order.append(forward)
        order.append(backward)
    order.extend(backwards[len(forwards) - warmup :])
    return order


def zero_bubble(num_stages: int, num_micro: int, stage: int) -> list[Action]:
    """ZB-H1: 1F1B with the backward in halves, the weights' half put off by as many micro-batches as there are stages before.

    The gradient of the input goes on at once; the gradient of the weights, which nobody waits for, fills what was the bubble.
    No stage holds more than num_stages micro-batches, the peak of 1F1B's first stage (Qi et al. 2024, arXiv:2401.10241,
    section 2). With F = I = W the bubble is (p - 1) / (3 m + p - 1) for m >= p micro-batches. Any num_micro from 1 up.
    """
    order: list[Action] = []
    for action in one_f_one_b(num_stages, num_micro, stage):
        if action.kind == "F":
            order.append(action)
            continue
        order.append(Action("I", action.micro))
        if action.micro >= stage:
            order.append(Action("W", action.micro - stage))
    order.extend(Action("W", micro) for micro in range(max(0, num_micro - stage), num_micro))
    return order


def orders(name: str, num_stages: int, num_micro: int, num_chunks: int = 1) -> list[list[Action]]:
    """The order of every stage under the schedule called ``name``: one of ``SCHEDULES``, else ``ValueError``."""
    if name not in SCHEDULES:
        raise ValueError(f"no pipeline schedule {name}; there are {', '.join(SCHEDULES)}")
    if name == "interleaved":
        return [interleaved(num_stages, num_micro, num_chunks, stage) for stage in range(num_stages)]
    if num_chunks != 1:
        raise ValueError(f"schedule {name} has one chunk a stage, got {num_chunks}; schedule interleaved has several")
    one = one_f_one_b if name == "1f1b" else zero_bubble
    return [one(num_stages, num_micro, stage) for stage in range(num_stages)]


def bubble_fraction(num_stages: int, num_micro: int, num_chunks: int = 1) -> float:
    """Part of a step in which a stage is idle, with equal stages: (p - 1) / (v m + p - 1), for 1f1b (v = 1) and interleaved.

    As a part of the whole step; arXiv:2104.04473, section 2.2, prints it relative to the busy time, (p - 1) / (v m).
    """
    return (num_stages - 1) / (num_chunks * num_micro + num_stages - 1)


def peak_in_flight(order: list[Action]) -> int:
    """Most activations of a micro-batch and chunk that one stage holds at once: from F to B, or to W where backwards are halved."""
    held = peak = 0
    for action in order:
        if action.kind == "F":
            held += 1
            peak = max(peak, held)
        elif action.kind != "I":
            held -= 1
    return peak


def _check(num_stages: int, num_micro: int, stage: int) -> None:
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage {stage} is outside a pipeline of {num_stages} stages")
    if num_micro < 1:
        raise ValueError(f"a pipeline needs at least 1 micro-batch, got {num_micro}")
