"""``bench zero1``: what ZeRO-1 on two ranks costs beyond the step itself and its communication.

Two CPU ranks of one thread. In each round both take a step of the plain engine on their own rows at the same time, then a step of
ZeRO-1 on the same rows together. The ledger says how long the second one spent inside collectives, waiting included; what is left
over the plain step is the price of the machinery: flat buffers, copies into them and out, casts, bookkeeping.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from dist_llm.bench.step import LENGTH, RandomRows, step_config
from dist_llm.comm.collectives import barrier
from dist_llm.comm.context import ParallelContext
from dist_llm.comm.ledger import CommLedger
from dist_llm.engine.batches import StepBatches
from dist_llm.engine.build import build_engine, choose_ops
from dist_llm.engine.launch import tune_allocator
from dist_llm.engine.step import StepResult, train_step
from dist_llm.parallel.ranks import run_on_ranks

__all__ = ["race_zero1", "zero1_as_text"]

RANKS, ROWS = 2, 12  # rows of one rank
WARM_UP = 2


def race_zero1(*, rounds: int) -> dict[str, Any]:
    """Run the race; medians of the main rank over ``rounds`` rounds, wall time."""
    answer: dict[str, Any] = run_on_ranks(_race, dp=RANKS, args=(rounds,), deadline_s=120 + 10.0 * rounds)[0]
    return answer


def _race(ctx: ParallelContext, rounds: int) -> dict[str, Any]:
    tune_allocator()
    with CommLedger() as ledger:  # before DeepSpeed exists: it keeps references to the functions
        config = step_config(engine="plain")
        whole = config.model_copy(
            update={"train": config.train.model_copy(update={"batch_size": RANKS * ROWS, "micro_batch_size": ROWS, "engine": "deepspeed"})}
        )
        alone = ParallelContext(device=ctx.device)
        chosen = choose_ops(config, ctx)
        rows: Any = RandomRows(config.model.vocab_size)
        plain, zero = build_engine(config, alone, chosen, None), build_engine(whole, ctx, chosen, None)
        own, shared = StepBatches(rows, config, alone), StepBatches(rows, whole, ctx)
        times: dict[str, list[float]] = {"plain": [], "zero1": [], "comm": []}
        for n in range(WARM_UP + rounds):
            barrier(ctx.world, ctx.device)
            # The same rows as this rank's share of the other step.
            result = train_step(plain, alone, own, next_sample=(RANKS * n + ctx.dp.rank) * ROWS, lr=1e-4, stop_code=0)
            assert isinstance(result, StepResult)
            times["plain"].append(result.step_s)
            barrier(ctx.world, ctx.device)
            ledger.take()
            result = train_step(zero, ctx, shared, next_sample=RANKS * n * ROWS, lr=1e-4, stop_code=0)
            assert isinstance(result, StepResult)
            times["zero1"].append(result.step_s)
            times["comm"].append(ledger.take())
        zero.close()
    kept = {name: values[WARM_UP:] for name, values in times.items()}
    # Of each round by itself: a round in which the machine was busy is slow in all three.
    overheads = [z / (p + c) - 1 for p, z, c in zip(kept["plain"], kept["zero1"], kept["comm"], strict=True)]
    return {
        "case": "zero1",
        "ranks": RANKS,
        "rows_of_a_rank": ROWS,
        "plain_ms": 1000 * median(kept["plain"]),
        "zero1_ms": 1000 * median(kept["zero1"]),
        "communication_ms": 1000 * median(kept["comm"]),
        "overhead_pct": 100 * median(overheads),
        "rounds": rounds,
    }


def zero1_as_text(answer: dict[str, Any]) -> str:
    """The answer of ``race_zero1`` for a person."""
    return "\n".join(
        [
            f"one step of 6 x 384, {answer['ranks']} ranks of {answer['rows_of_a_rank']} x {LENGTH}, bf16, one thread each, medians of {answer['rounds']}",
            f"  plain engine, each rank by itself   {answer['plain_ms']:8.1f} ms",
            f"  ZeRO-1 together                     {answer['zero1_ms']:8.1f} ms",
            f"  of it in collectives                {answer['communication_ms']:8.1f} ms",
            f"  ZeRO-1 over plain + collectives     {answer['overhead_pct']:+8.1f} %   (goal: at most +5 %)",
        ]
    )
