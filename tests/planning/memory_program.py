"""What a rank really holds: counted from the engine's own tensors and from what autograd saves. Run on ranks by the tests beside."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dist_llm.comm.build import build_context
from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import RunConfig
from dist_llm.engine.base import DeviceBatch, LossModule
from dist_llm.engine.batches import StepBatches
from dist_llm.engine.build import build_engine, choose_ops
from dist_llm.parallel.divide import grid_of
from dist_llm.verify.rows import MadeUpRows


def storage_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the storages of ``tensors``, each counted once."""
    sizes = {}
    for tensor in tensors:
        if tensor is not None and tensor.untyped_storage().nbytes():
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def context_of(run: RunConfig, ctx: ParallelContext) -> ParallelContext:
    return build_context(
        grid_of(run.parallel, ctx.world.size), ctx.world.rank, ctx.device, kv_heads=run.model.kv_heads,
        local_rank=ctx.world.rank, local_size=ctx.world.size,
    )  # fmt: skip


def saved_bytes(module: LossModule, batch: DeviceBatch, hidden: torch.Tensor | None = None) -> int:
    """Bytes that autograd keeps of one forward: each storage once, the parameters not counted."""
    lent = [module.model.borrowed_head] if module.model.borrowed_head is not None else []
    weights = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *lent]}
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        out = module(batch, hidden)
    storages = {s.data_ptr(): s.nbytes() for s in (saved.tensor.untyped_storage() for saved in kept)}
    del out  # up to here the graph holds what it saved, and what hangs on a result that nobody took is gone
    return sum(size for address, size in storages.items() if address not in weights)


def peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes that ``step`` holds at once on a CPU, by the allocator's record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


class _Saved:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # a saved result would hold the node that holds it


def count_states(ctx: ParallelContext, configs: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Take a step with each config; bytes of what the engine holds at the end of its last backward."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch renames a collective that DeepSpeed calls by its old name
    return [_count(RunConfig.model_validate(config), ctx) for config in configs]


def _count(run: RunConfig, ctx: ParallelContext) -> dict[str, int]:
    mine = context_of(run, ctx)
    engine: Any = build_engine(run, mine, choose_ops(run, mine), None)
    batches, valid = StepBatches(MadeUpRows(run), run, mine).at(0)
    found: dict[str, int] = {}
    lent: list[int] = [0]
    step = engine._engine.step

    def count_and_step() -> Any:
        found.update(_held(engine))
        return step()

    engine._engine.step = count_and_step
    if engine._tied is not None and engine._tied.owner is None:
        send = engine._tied.send_gradient

        def count_and_send() -> None:
            lent[0] = storage_bytes([engine._tied._last.borrowed_head.grad])  # gone when the step begins
            send()

        engine._tied.send_gradient = count_and_send
    engine.train_step(batches, num_tokens=max(1, valid), lr=1e-3)
    engine.close()
    found["gradients"] += lent[0]
    return found | {"stage": mine.pp.rank, "tp_rank": mine.tp.rank, "zero_rank": mine.zero.rank}


def _held(engine: Any) -> dict[str, int]:
    optimizer = engine._engine.optimizer
    parameters = [p for _, p in engine._named]
    weights = [*parameters, *(part.model.borrowed_head for part in engine._parts)]
    gradients = [*(p.grad for p in parameters), *(getattr(p, "grad_accum", None) for p in parameters)]
    masters: list[torch.Tensor] = []
    buckets: list[torch.Tensor] = []
    kind = type(optimizer).__name__
    if kind == "BF16_Optimizer":
        weights += optimizer.bf16_groups_flat
        gradients += optimizer.fp32_groups_gradients_flat
        masters = optimizer.fp32_groups_flat_partition
    elif kind == "DeepSpeedZeroOptimizer":
        weights += optimizer.bit16_groups_flat
        masters = optimizer.single_partition_of_fp32_groups
        for group in optimizer.averaged_gradients.values():
            gradients += [*group, getattr(group, "flat_partition", None)]
        gradients += [t for group in optimizer.all_grad_tensors.values() for t in group or []]
        buckets = [b for bucket in optimizer.ipg_buckets.values() for b in bucket.buffer]
    elif kind == "DeepSpeedZeroOptimizer_Stage3":
        weights += [optimizer.lp_param_buffer]
        gradients += [optimizer.grad_partitions_flat_buffer]
        masters = optimizer.fp32_partitioned_groups_flat
        buckets = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
    else:
        assert kind == "FusedAdamW", f"an optimiser of DeepSpeed that nothing is known of: {kind}"
    moments = [t for state in engine._basic.state.values() for key, t in state.items() if key != "step"]
    return {
        "parameters": storage_bytes(weights),
        "gradients": storage_bytes(gradients),
        "masters": storage_bytes(masters),
        "moments": storage_bytes(moments),
        "all": _all_floats() - storage_bytes(buckets),
    }


def _all_floats() -> int:
    """Every float tensor of a page or more that this process can reach: what the lists above forgot would be in here."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.is_floating_point() and o.device.type == "cpu"]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return storage_bytes(t for t in tensors if t.untyped_storage().nbytes() >= 4096)


def count_saved(ctx: ParallelContext, configs: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Bytes that autograd keeps on this rank of one micro-batch's forward, with each config."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    found = []
    for config in configs:
        run = RunConfig.model_validate(config)
        mine = context_of(run, ctx)
        engine: Any = build_engine(run, mine, choose_ops(run, mine), None)
        batch = StepBatches(MadeUpRows(run), run, mine).at(0)[0][0]
        module, hidden = engine.loss_module, None
        if not module.model.is_first:
            rows, tokens = batch.tokens.shape
            shape = (rows, tokens // (mine.tp.size if module.model.region.sequence else 1), run.model.d_model)
            hidden = torch.zeros(shape, dtype=module.model.compute_dtype, requires_grad=True)
        if getattr(engine, "_tied", None) is not None:
            engine._tied.lend()
        found.append({"bytes": saved_bytes(module, batch, hidden), "stage": mine.pp.rank, "tp_rank": mine.tp.rank})
        engine.close()
    return found
