"""Bytes of parameters, gradients, masters and moments on one rank, as DeepSpeed (0.19) and the plain engine keep them.

At the end of the last backward of a step, with n elements on the rank, z ranks of ZeRO, n' = n filled up to a multiple of 2 z in
each of the optimiser's two groups (matrices, vectors), and m the sum over tensors of ceil(size / z):

    | | parameters | gradients | masters | moments |
    | --- | --- | --- | --- | --- |
    | plain, ZeRO 0 | 4 n | 4 n | the parameters | 8 n |
    | ZeRO 1, bf16 | 2 n' | 4 n' + 2 n | 4 n'/z | 8 n'/z |
    | ZeRO 2, bf16 | 2 n' | 4 n'/z | 4 n'/z | 8 n'/z |
    | ZeRO 1, 2, fp32 | 4 n' | 4 x the tensors that reach into this part, whole | 4 n'/z | 8 n'/z |
    | ZeRO 3 | b m + b x tensors up to 100,000 elements, whole | 4 m | 4 m | 8 m |

Found by counting on running ranks; docs/planning/memory.md says in which of its tensors they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dist_llm.planning.shapes import ModelShape
from dist_llm.planning.stage_tensors import Stage, StageTensors, tensors_of

__all__ = ["StateBytes", "state_bytes"]

_PERSISTENT = 100_000  # DeepSpeed's param_persistence_threshold: smaller tensors stay gathered in ZeRO-3
_BUCKET = 500_000_000  # reduce_bucket_size, elements
_LIVE = 1_000_000_000  # max_live_parameters and max_reuse_distance of ZeRO-3, elements


@dataclass(frozen=True)
class StateBytes:
    """Bytes on the device.

    buffers: what gradients and parameters pass through in the backward, besides the above. at_step: what the optimiser step needs
    instead, when activations are gone.
    """

    parameters: int
    gradients: int
    masters: int
    moments: int
    buffers: int = 0
    at_step: int = 0


@lru_cache(maxsize=65536)
def state_bytes(
    model: ModelShape,
    stage: Stage,
    *,
    tp: int,
    ep: int,
    zero: int,
    zero_ranks: int,
    expert_ranks: int,
    bf16: bool,
    tp_rank: int = 0,
    zero_rank: int | None = None,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    overlaps: bool = True,
) -> StateBytes:
    """States of one rank of ``stage`` as the trainer keeps them.

    Args:
        model: the whole model.
        stage: of ``stages_of``.
        tp: tensor-parallel ranks. tp_rank: which of them.
        ep: ranks that share the experts.
        zero: ZeRO stage; 0 also stands for the plain engine.
        zero_ranks: ranks that state is divided over. zero_rank: which of them; default the one that holds most.
        expert_ranks: the same for experts, which have copies on fewer ranks.
        bf16: precision; else fp32.
        offload_optimizer: masters, moments and gradients are kept on the host.
        offload_parameters: ZeRO-3's parts of the parameters are.
        overlaps: communication overlaps the backward, as on CUDA, and has two buffers to do it with.
    """
    tensors = tensors_of(model, stage, tp, ep, tp_rank)
    lent = 4 * tensors.lent_head
    if zero == 0:
        n = sum(tensor.size * count for tensor, count in tensors.counted())
        # One flat copy of a bucket of gradients while they are summed over several ranks.
        return StateBytes(4 * n + lent, 4 * n + lent, 0, 8 * n, 4 * min(n, _BUCKET) if zero_ranks > 1 else 0)
    low = 2 if bf16 else 4
    if zero == 3:
        states = _stage_three(tensors, zero_ranks, expert_ranks, low)
    else:
        states = _flat(tensors, zero, zero_ranks, expert_ranks, bf16, zero_rank, overlaps)
    parameters = 0 if offload_parameters and zero == 3 else states.parameters
    return StateBytes(
        parameters=parameters + lent,
        gradients=(0 if offload_optimizer else states.gradients) + lent,
        masters=0 if offload_optimizer else states.masters,
        moments=0 if offload_optimizer else states.moments,
        # Stage 1 adds up whole gradients on the device before any goes to the host.
        buffers=states.buffers + (states.gradients if offload_optimizer and zero == 1 else 0),
        at_step=0 if offload_optimizer else states.at_step,
    )


def _flat(tensors: StageTensors, zero: int, ranks: int, expert_ranks: int, bf16: bool, rank: int | None, overlaps: bool) -> StateBytes:
    """ZeRO 1 and 2: one flat buffer a group, filled up to a multiple of two elements a rank."""
    sums = [[0, 0], [0, 0]]
    for tensor, count in tensors.counted():
        sums[tensor.expert][tensor.decayed] += tensor.size * count
    whole = held = 0
    for expert, divided in ((0, ranks), (1, expert_ranks)):
        for group in sums[expert]:
            filled = -(-group // (2 * divided)) * 2 * divided
            whole += filled
            held += filled // divided
    n = sum(map(sum, sums))
    staging = min(n, _BUCKET)
    if bf16 and zero == 1:
        # Its optimiser for bf16 keeps fp32 sums of everything, and the bf16 gradients of the last backward until the next.
        return StateBytes(2 * whole, 4 * whole + 2 * n, 4 * held, 8 * held, 4 * staging if ranks > 1 else 0)
    low = 2 if bf16 else 4
    buckets = low * _BUCKET * (2 if overlaps else 1) + (4 * staging if bf16 else 0)  # a bf16 bucket is summed as fp32
    if bf16:
        return StateBytes(2 * whole, 4 * held, 4 * held, 8 * held, buckets)
    gradients = 4 * sum(_reached(tensors.in_order(decayed=decayed), ranks, rank) for decayed in (True, False))
    # Stage 1 adds up whole gradients and lets go of those it does not need at the end.
    passing = max(0, 4 * n - gradients) if zero == 1 else 0
    return StateBytes(4 * whole, gradients, 4 * held, 8 * held, buckets + passing, 4 * held)


def _reached(sizes: list[int], ranks: int, rank: int | None) -> int:
    """Elements of the tensors, whole, that reach into one of ``ranks`` equal parts of the flat buffer, and what fills it up."""
    n = sum(sizes)
    part = -(-n // (2 * ranks)) * 2
    ends = []
    position = 0
    for size in sizes:
        position += size
        ends.append(position)

    def reached(which: int) -> int:
        start, stop = which * part, (which + 1) * part
        total = max(0, stop - max(n, start))
        for size, end in zip(sizes, ends, strict=True):
            if end > start and end - size < stop:
                total += size
        return total

    if rank is not None:
        return reached(rank)
    if ranks * len(sizes) <= 4096:
        return max(reached(which) for which in range(ranks))
    # With many ranks a part is at most filled up by a largest tensor on either side.
    return part + 2 * max(sizes, default=0)


def _stage_three(tensors: StageTensors, ranks: int, expert_ranks: int, low: int) -> StateBytes:
    """ZeRO 3: each tensor divided by itself; small ones stay gathered."""
    held = persistent = n = 0
    for tensor, count in tensors.counted():
        divided = expert_ranks if tensor.expert else ranks
        held += -(-tensor.size // divided) * count
        n += tensor.size * count
        if divided > 1 and tensor.size <= _PERSISTENT:
            persistent += tensor.size * count
    live = min(max(0, n - persistent), _LIVE) if ranks > 1 else 0
    return StateBytes(low * (held + persistent), 4 * held, 4 * held, 8 * held, low * live + 4 * _BUCKET, 4 * held)
