"""The pipeline of the time model: how many layers a stage has, and what stages that are not equal cost."""

from __future__ import annotations

__all__ = ["bubble_seconds", "stage_layers"]


def stage_layers(num_layers: int, pp: int) -> tuple[int, int]:
    """(layers of the fullest stage, layers of the last).

    Where layers do not divide, embedding and head take a layer's place if that comes out even (Megatron's and DeepSpeed's option
    to count them); else the rest is missing on the last stage, which has the head.
    """
    if pp == 1:
        return num_layers, num_layers
    if num_layers % pp and (num_layers + 2) % pp == 0:
        slots = (num_layers + 2) // pp
        return slots, slots - 1
    most = -(-num_layers // pp)
    return most, max(0, num_layers - most * (pp - 1))


def bubble_seconds(first: float, middle: float, last: float, pp: int, virtual_pp: int = 1) -> float:
    """Seconds that 1F1B's slowest stage waits in a step, for seconds of a micro-batch on the first, each middle and the last stage.

    While the pipeline fills and drains, the slowest stage waits for one micro-batch to pass through all others, forward and
    backward; with v chunks a stage for a v-th of it (Narayanan et al., arXiv:2104.04473, section 2.2).
    """
    if pp == 1:
        return 0.0
    whole = first + (pp - 2) * middle + last
    slowest = max(first, middle, last) if pp > 2 else max(first, last)
    return (whole - slowest) / virtual_pp
