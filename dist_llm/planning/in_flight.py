"""How many micro-batches a pipeline stage holds at once, chunk by chunk: what its activations are multiplied by."""

from __future__ import annotations

from functools import lru_cache

from dist_llm.topology.schedule import interleaved

__all__ = ["in_flight"]


@lru_cache(maxsize=65536)
def in_flight(pp: int, virtual_pp: int, num_micro: int, stage: int) -> tuple[int, ...]:
    """Micro-batches between forward and backward when there are most, for each chunk of ``stage``.

    1F1B: min(num_micro, pp - stage), ``topology.schedule.peak_in_flight`` of its order (Narayanan et al., arXiv:2104.04473,
    section 2.2). Interleaved: counted along the order of a few rounds, after which it repeats; num_micro is taken up to whole
    rounds.
    """
    if pp == 1:
        return (1,) * virtual_pp
    if virtual_pp == 1:
        return (min(num_micro, pp - stage),)
    rounds = min(-(-num_micro // pp), 4)
    held = [0] * virtual_pp
    most = tuple(held)
    for action in interleaved(pp, rounds * pp, virtual_pp, stage):
        held[action.chunk] += 1 if action.kind == "F" else -1
        if sum(held) > sum(most):
            most = tuple(held)
    return most
