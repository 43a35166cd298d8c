"""What DeepSpeed 0.19.8 sends to divide state and sum gradients, read from its source and held to the ledger.

Stage 0 sums gradients in ``runtime/engine.py``, stage 1 in bf16 in ``runtime/bf16_optimizer.py``, stages 1 and 2 otherwise in
``runtime/zero/stage_1_and_2.py``, stage 3 in ``stage3.py`` and ``partition_parameters.py``. Gradients travel in fp32 at every
precision, as the engine's generated config says. Calls are counted as torch.distributed sees them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dist_llm.config.schema import RunConfig
from dist_llm.planning.count import parameter_shapes
from dist_llm.planning.shards import local_shape
from dist_llm.planning.wire import Counts, add_counts, traffic
from dist_llm.planning.zero3_fetch import Parameter, count_fetches, module_calls
from dist_llm.topology.grid import RankGrid

__all__ = ["DeepSpeedSettings", "part_parameters", "zero_traffic"]

_FP32 = 4
_FP64 = 8
_FLAG = 1
_ENGINE_BUCKET = 500_000_000  # MEMORY_OPT_ALLREDUCE_SIZE of runtime/engine.py: stage 0 and bf16 stage 1 do not read the config


@dataclass(frozen=True)
class DeepSpeedSettings:
    """Fields of ``zero_optimization`` that decide about calls and bytes, with DeepSpeed's defaults; sizes in elements."""

    reduce_bucket_size: int = 500_000_000
    sub_group_size: int = 1_000_000_000
    param_persistence_threshold: int = 100_000
    model_persistence_threshold: int = sys.maxsize
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000


def part_parameters(config: RunConfig, parts: Sequence[range], *, tp_size: int, tp_rank: int) -> list[Parameter]:
    """Parameters of one rank in the module's order: those of the blocks in ``parts``, and what the end stages have besides."""
    shapes, model = parameter_shapes(config.model), config.model
    answer = []
    for blocks in parts:
        for name, shape in shapes.items():
            if name.startswith("blocks."):
                mine = int(name.split(".")[1]) in blocks
            elif name.startswith(("embedding.", "positions.")):
                mine = blocks.start == 0
            else:
                mine = blocks.stop == model.num_layers
            if mine:
                answer.append(Parameter(name, math.prod(local_shape(name, shape, model, tp_size, tp_rank)), len(shape)))
    return answer


def zero_traffic(
    config: RunConfig, grid: RankGrid, parameters: Sequence[Parameter], num_micro: int, names: dict[str, str], settings: DeepSpeedSettings
) -> Counts:
    """One optimiser step.

    Args:
        config: the run.
        grid: sizes of the axes.
        parameters: this rank's, from ``part_parameters``.
        num_micro: micro-batches.
        names: from ``group_names``.
        settings: of DeepSpeed.
    """
    stage, bf16 = config.parallel.zero, config.precision == "bf16"
    n = grid.group_size(("cp", "dp"))
    model_size = grid.group_size(("tp", "pp"))
    zero, model = names["zero"], names["model"]
    # The optimiser's two groups: matrices are decayed, vectors are not.
    groups = [g for g in ([p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]) if g]

    def over_model(calls: int, each: int) -> Counts:
        return {(model, "all_reduce"): traffic("all_reduce", model_size, calls * each, calls)}

    def over_both(calls: int, each: int) -> Counts:
        return add_counts({(zero, "all_reduce"): traffic("all_reduce", n, calls * each, calls)}, over_model(calls, each))

    if stage == 0:
        calls = len(_flush_after([p.numel for p in parameters], _ENGINE_BUCKET))
        reduced = traffic("all_reduce", n, _FP32 * sum(p.numel for p in parameters), calls)
        return add_counts({(zero, "all_reduce"): reduced}, over_model(1, _FP32))  # the norm is ours
    element = 2 if bf16 else _FP32
    if stage == 3:
        norm = over_both(_sub_groups(groups, n, settings), _FP64 if config.parallel.offload_optimizer == "none" else _FP32)
        return add_counts(_stage_3(config, parameters, num_micro, n, element, zero, settings), norm)
    # The flat buffer of a group ends on a multiple of 2 elements a rank (nccl_start_alignment_factor).
    padded = [-(-sum(p.numel for p in group) // (2 * n)) * 2 * n for group in groups]
    gathered = {(zero, "all_gather"): traffic("all_gather", n, element * sum(padded), len(padded))}
    if stage == 1 and bf16 and config.parallel.offload_optimizer == "none":
        # BF16_Optimizer reduces the fp32 sums of all micro-batches, in the padded buffers, and takes the norm of whole gradients.
        reduced = traffic("all_reduce", n, _FP32 * sum(padded), len(_flush_after(padded, _ENGINE_BUCKET)))
        return add_counts({(zero, "all_reduce"): reduced}, gathered, over_model(1, _FP32))
    if stage == 1:
        rounds, order = 1, [p for group in groups for p in group]
    else:
        # Every micro-batch reduces at once, in the order in which backward makes gradients.
        rounds, order = num_micro, list(reversed(parameters))
    buckets = _buckets([p.numel for p in order], settings.reduce_bucket_size)
    reduced = traffic("all_reduce", n, rounds * _FP32 * sum(p.numel for p in parameters), rounds * len(buckets))
    overflow = over_both(1, _FLAG) if bf16 else {}
    return add_counts({(zero, "all_reduce"): reduced}, gathered, overflow, over_both(len(groups), _FP32))


def _stage_3(
    config: RunConfig,
    parameters: Sequence[Parameter],
    num_micro: int,
    n: int,
    element: int,
    zero: str,
    settings: DeepSpeedSettings,
) -> Counts:
    def whole(parameter: Parameter) -> int:
        return -(-parameter.numel // n) * n  # each parameter is padded to the ranks by itself

    persistent, resident = set(), 0
    for parameter in parameters:
        if parameter.numel <= settings.param_persistence_threshold and resident + parameter.numel <= settings.model_persistence_threshold:
            persistent.add(parameter.name)
            resident += parameter.numel
    kept = [p for p in parameters if p.name in persistent]
    # Small parameters stay whole, and are gathered once, after the update.
    after_update = traffic("all_gather", n, element * sum(whole(p) for p in kept), len(kept))
    fetches = count_fetches(
        module_calls(config, {p.name: p for p in parameters}),
        persistent,
        max_live=settings.max_live_parameters,
        max_reuse_distance=settings.max_reuse_distance,
        prefetch=settings.prefetch_bucket_size,
    )
    fetched = traffic(
        "all_gather",
        n,
        num_micro * element * sum(times * whole(p) for p, times in fetches.parameters.items()),
        num_micro * fetches.calls,
    )
    buckets = _buckets([p.numel for p in reversed(parameters)], settings.reduce_bucket_size)
    scattered = traffic("reduce_scatter", n, num_micro * _FP32 * sum(whole(p) for p in parameters), num_micro * len(buckets))
    return {(zero, "all_gather"): after_update + fetched, (zero, "reduce_scatter"): scattered}


def _sub_groups(groups: Sequence[Sequence[Parameter]], n: int, settings: DeepSpeedSettings) -> int:
    """Pieces in which stage 3 updates; each has its part of the norm."""
    # A piece is closed by the parameter that fills it, in elements of one rank.
    return sum(len(_flush_after([-(-p.numel // n) for p in group], settings.sub_group_size - 1)) for group in groups)


def _flush_after(sizes: Iterable[int], limit: int) -> list[int]:
    """Pack in order; a pack is closed by the piece that takes it above ``limit``."""
    packs, current = [], 0
    for size in sizes:
        current += size
        if current > limit:
            packs.append(current)
            current = 0
    return packs + ([current] if current else [])


def _buckets(sizes: Iterable[int], limit: int) -> list[int]:
    """Pack in order; a pack is closed before the piece that would take it above ``limit``."""
    packs, current = [], 0
    for size in sizes:
        if current and current + size > limit:
            packs.append(current)
            current = 0
        current += size
    return packs + ([current] if current else [])
