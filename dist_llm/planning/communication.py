"""Every byte of an optimiser step, by group and collective, before the run: what ``comm.ledger`` counts while it runs.

    step_traffic(config, grid, rank) == ledger.take_counts()     exactly, from the third step on

DeepSpeed's first step at ZeRO-3 sends more: it records which module comes when, and compares notes between ranks. A run with one rank
and no DeepSpeed sends nothing. docs/communication.md sets the figures beside those of the papers.
"""

from __future__ import annotations

from dist_llm.config.schema import RunConfig
from dist_llm.planning.layer_traffic import FP32, activation_bytes, group_names, layer_traffic, vocabulary_rows
from dist_llm.planning.stages import stage_layers
from dist_llm.planning.wire import Counts, add_counts, traffic
from dist_llm.planning.zero_traffic import DeepSpeedSettings, part_parameters, zero_traffic
from dist_llm.topology.grid import RankGrid
from dist_llm.topology.schedule import orders

__all__ = ["DeepSpeedSettings", "step_traffic"]

_FP64 = 8


def step_traffic(config: RunConfig, grid: RankGrid, rank: int, settings: DeepSpeedSettings | None = None) -> Counts:
    """What ``rank`` sends and receives in one optimiser step in the steady state.

    Args:
        config: the run.
        grid: sizes of the axes; ``parallel.dp`` is taken from here.
        rank: its number in the world.
        settings: of DeepSpeed; the default is what the engine generates.

    Raises:
        ValueError: the global batch does not divide into micro-batches, or the model into stages.
    """
    settings = settings if settings is not None else DeepSpeedSettings()
    at, sizes = grid.coordinates(rank), grid.sizes
    rows = config.train.micro_batch_size * sizes["dp"]
    if config.train.batch_size % rows != 0:
        raise ValueError(f"train.batch_size ({config.train.batch_size}) must be divisible by micro_batch_size x dp = {rows}")
    num_micro = config.train.batch_size // rows
    chunks = config.parallel.chunks
    stages = stage_layers(config.model, config.data.seq_len, sizes["pp"] * chunks)
    mine = [chunk * sizes["pp"] + at["pp"] for chunk in range(chunks)]
    names = group_names(grid, config.model.kv_heads)
    many = [_control(names, grid.size)]
    for stage in mine:
        per_micro = layer_traffic(
            config, grid, blocks=stages[stage], is_first=stage == 0, is_last=stage == len(stages) - 1, tp_rank=at["tp"]
        )
        many += [per_micro] * num_micro
    if sizes["pp"] > 1:
        many.append(_pipeline(config, grid, at["pp"], num_micro))
        many.append(_tied_head(config, grid, at["pp"], at["tp"]))
    parameters = part_parameters(config, [stages[stage] for stage in mine], tp_size=sizes["tp"], tp_rank=at["tp"])
    many.append(zero_traffic(config, grid, parameters, num_micro, names, settings))
    return add_counts(*many)


def _control(names: dict[str, str], world: int) -> Counts:
    # Before the step how many targets count and whether to stop, three fp64 numbers; after it the loss, one.
    return {(names["world"], "all_reduce"): traffic("all_reduce", world, 4 * _FP64, 2)}


def _pipeline(config: RunConfig, grid: RankGrid, pp_rank: int, num_micro: int) -> Counts:
    """Hidden states forward, their gradients back, at every edge between the stages of different ranks."""
    parallel, sizes = config.parallel, grid.sizes
    num_stages = sizes["pp"] * parallel.chunks
    tokens = config.train.micro_batch_size * config.data.seq_len // sizes["cp"]
    sequence = sizes["tp"] if parallel.sequence_parallel else 1
    hidden = tokens // sequence * config.model.d_model * activation_bytes(config)
    forward_sends = forward_recvs = 0
    for action in orders(parallel.schedule, sizes["pp"], num_micro, parallel.chunks)[pp_rank]:
        if action.kind == "F":
            stage = action.chunk * sizes["pp"] + pp_rank
            forward_sends += stage < num_stages - 1
            forward_recvs += stage > 0
    edges = {
        ("pp", "send"): forward_sends,
        ("pp", "recv"): forward_recvs,
        ("pp_back", "send"): forward_recvs,
        ("pp_back", "recv"): forward_sends,
    }
    names = group_names(grid)
    return add_counts({(names[group], kind): traffic(kind, sizes["pp"], calls * hidden, calls) for (group, kind), calls in edges.items()})


def _tied_head(config: RunConfig, grid: RankGrid, pp_rank: int, tp_rank: int) -> Counts:
    """The first stage lends the last its embedding and gets the gradient back, in fp32."""
    last = grid.sizes["pp"] - 1
    if not config.model.tie_embeddings or pp_rank not in (0, last):
        return {}
    elements = vocabulary_rows(config, grid.sizes["tp"], tp_rank) * config.model.d_model
    weight = elements * (2 if config.precision == "bf16" and config.parallel.zero > 0 else FP32)
    gradient = elements * FP32
    out, back = (weight, gradient) if pp_rank == 0 else (gradient, weight)
    return {("ends", "send"): traffic("send", 2, out), ("ends", "recv"): traffic("recv", 2, back)}
