from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dist_llm.comm.context import ParallelContext
from dist_llm.comm.ledger import CommLedger
from dist_llm.comm.measure import MEASURES
from dist_llm.parallel.ranks import run_on_ranks
from dist_llm.planning.wire import COLLECTIVES, Traffic, add_counts, summarize, traffic, wire_share

SIZE = 3
LATE_S = 0.4
PRESENT = [name for name in MEASURES if hasattr(dist, name)]
# As a library keeps them that was imported before the ledger ran.
all_gather_from_before, isend_from_before, irecv_from_before = dist.all_gather_into_tensor, dist.isend, dist.irecv


def functions() -> list[object]:
    return [getattr(module, name) for module in (dist, c10d) for name in PRESENT]


def test_every_function_is_wrapped_inside_and_as_before_outside() -> None:
    before = functions()
    assert len(before) > 40
    with CommLedger():
        inside = functions()
        assert all(new is not old for new, old in zip(inside, before, strict=True))
        assert [f.__name__ for f in inside] == [f.__name__ for f in before]  # type: ignore[attr-defined]
    assert functions() == before


def test_functions_come_back_after_an_exception() -> None:
    before = functions()
    with pytest.raises(RuntimeError, match="elsewhere"), CommLedger():
        raise RuntimeError("elsewhere")
    assert functions() == before


def test_every_measure_takes_the_arguments_of_its_function() -> None:
    import inspect

    for name in PRESENT:
        theirs = inspect.signature(getattr(dist, name)).parameters
        assert list(theirs) == list(inspect.signature(MEASURES[name]).parameters)[: len(theirs)], name


def test_a_call_that_fails_raises_what_it_raised_and_counts_time_without_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_and_wrong(tensor: torch.Tensor) -> None:
        time.sleep(0.02)
        raise ValueError("no such group")

    monkeypatch.setattr(dist, "all_reduce", slow_and_wrong)
    with CommLedger() as ledger:
        for _ in range(2):  # after a failure the next call is again an outermost one
            with pytest.raises(ValueError, match="no such group"):
                dist.all_reduce(torch.ones(1))
            assert ledger.take() >= 0.02
    assert ledger.take() == 0
    assert ledger.take_counts() == {}


def one_of_each(ctx: ParallelContext) -> dict[str, dict[str, Any]]:
    """What the ledger says of every function called once on the world."""
    rank, world = ctx.world.rank, ctx.world.handle
    f32, bf16 = torch.zeros(6), torch.zeros(6, dtype=torch.bfloat16)
    parts = [torch.zeros(2) for _ in range(SIZE)]
    after, before = (rank + 1) % SIZE, (rank - 1) % SIZE

    def batch(isend: Callable[..., Any], irecv: Callable[..., Any]) -> None:
        ops = [dist.P2POp(isend, f32, after), dist.P2POp(irecv, torch.zeros(6), before)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    def single() -> None:
        sending = dist.isend(bf16, after, group=world)
        dist.recv(torch.zeros(6, dtype=torch.bfloat16), before)
        sending.wait()

    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(f32),
        "all_reduce bf16, by keyword": lambda: dist.all_reduce(tensor=bf16, group=world, op=dist.ReduceOp.MAX),
        "all_reduce async": lambda: dist.all_reduce(f32, async_op=True).wait(),
        "reduce": lambda: dist.reduce(f32, dst=0),
        "broadcast": lambda: dist.broadcast(f32, src=1),
        "all_gather": lambda: dist.all_gather([torch.zeros(6) for _ in range(SIZE)], f32),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.zeros(18), f32),
        "reduce_scatter": lambda: dist.reduce_scatter(torch.zeros(2), parts),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(torch.zeros(2), f32),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.zeros(6), f32),
        # Rank r sends r + 1 rows of two numbers to each, so what it keeps is r + 1 rows.
        "all_to_all_single uneven": lambda: dist.all_to_all_single(
            torch.zeros(6, 2), torch.zeros(SIZE * (rank + 1), 2), [1, 2, 3], [rank + 1] * SIZE
        ),
        "gather": lambda: dist.gather(f32, [torch.zeros(6) for _ in range(SIZE)] if rank == 0 else None, dst=0),
        "scatter": lambda: dist.scatter(torch.zeros(2), parts if rank == 0 else None, src=0),
        "batch_isend_irecv": lambda: batch(dist.isend, dist.irecv),
        "batch_isend_irecv, looked up before": lambda: batch(isend_from_before, irecv_from_before),
        "isend, recv": single,
        "barrier": lambda: dist.barrier(),  # looked up while the ledger runs
        "twice": lambda: (dist.all_reduce(f32), dist.all_reduce(bf16)),
    }
    answer = {}
    with CommLedger() as ledger:
        ledger.name_groups(ctx.named_groups())
        for what, call in calls.items():
            call()
            answer[what] = summarize(ledger.take_counts()).get("world", {})
            assert ledger.take_counts() == {}
    return answer


@functools.cache
def one_of_each_answers() -> list[dict[str, dict[str, Any]]]:
    return run_on_ranks(one_of_each, dp=SIZE)


@pytest.mark.parametrize(
    ("what", "expected"),
    [  # bytes and what one of three ranks sends of them on a ring
        ("all_reduce", {"all_reduce": (1, 24, 32)}),
        ("all_reduce bf16, by keyword", {"all_reduce": (1, 12, 16)}),
        ("all_reduce async", {"all_reduce": (1, 24, 32)}),
        ("reduce", {"reduce": (1, 24, 16)}),
        ("broadcast", {"broadcast": (1, 24, 16)}),
        ("all_gather", {"all_gather": (1, 72, 48)}),
        ("all_gather_into_tensor", {"all_gather": (1, 72, 48)}),
        ("reduce_scatter", {"reduce_scatter": (1, 24, 16)}),
        ("reduce_scatter_tensor", {"reduce_scatter": (1, 24, 16)}),
        ("all_to_all_single", {"all_to_all": (1, 24, 16)}),
        ("gather", {"gather": (1, 24, 16)}),
        ("scatter", {"scatter": (1, 8, 16 / 3)}),
        ("batch_isend_irecv", {"send": (1, 24, 24), "recv": (1, 24, 0)}),
        ("batch_isend_irecv, looked up before", {"send": (1, 24, 24), "recv": (1, 24, 0)}),
        ("isend, recv", {"send": (1, 12, 12), "recv": (1, 12, 0)}),
        ("barrier", {"barrier": (1, 0, 0)}),
        ("twice", {"all_reduce": (2, 36, 48)}),
    ],
)
def test_calls_and_bytes_of_a_collective(what: str, expected: dict[str, tuple[int, int, float]]) -> None:
    for answer in one_of_each_answers():
        assert {k: (v["calls"], v["bytes"], v["wire_bytes"]) for k, v in answer[what].items()} == expected


def test_what_a_rank_keeps_of_an_uneven_all_to_all_is_not_on_the_wire() -> None:
    for rank, answer in enumerate(one_of_each_answers()):
        rows = rank + 1
        assert answer["all_to_all_single uneven"] == {"all_to_all": {"calls": 1, "bytes": 3 * 8 * rows, "wire_bytes": 2 * 8 * rows}}


def name_the_groups(ctx: ParallelContext) -> dict[str, Any]:
    """An all-reduce of 4 bytes in each group of 2 x 2 ranks, in a copy of one, in a group that nobody named, and alone."""
    one = torch.ones(1)
    groups = ctx.named_groups()
    copy = dist.new_group(list(ctx.tp.ranks), use_local_synchronization=True)
    unnamed = dist.new_group([0, 3])
    alone = dist.new_group([ctx.world.rank], use_local_synchronization=True)
    with CommLedger() as ledger:
        ledger.name_groups(groups)
        for handle in (ctx.world.handle, ctx.tp.handle, ctx.pp.handle, ctx.pp_back.handle, copy, alone):
            dist.all_reduce(one, group=handle)
        dist.all_reduce(one)
        dist.all_reduce(one, group=unnamed)  # ranks 1 and 2 are not members: torch warns them and does nothing
        counts = ledger.take_counts()
    return {"aliases": {key: group.name for key, group in groups.items()}, "counts": summarize(counts)}


def test_groups_go_by_their_names_copies_by_the_names_of_their_ranks_and_others_by_rank() -> None:
    for rank, answer in enumerate(run_on_ranks(name_the_groups, tp=2, pp=2)):
        calls = {group: rows["all_reduce"]["calls"] for group, rows in answer["counts"].items()}
        # The first and the last stage are the only stages: "ends" has the ranks of pp, and is not used here.
        assert calls == {"world": 2, "tp": 2, "pp": 1, "pp_back": 1} | ({"ranks 0,3": 1} if rank in (0, 3) else {})
        assert all(rows["all_reduce"]["bytes"] == 4 * calls[group] for group, rows in answer["counts"].items())


def nest_and_keep_references(ctx: ParallelContext) -> dict[str, Any]:
    """Collectives made of others, ledgers in ledgers, and functions that were looked up too early or kept too long."""
    one, answer = torch.ones(1), {}

    def made_of_another(tensor: torch.Tensor, dst: int) -> None:
        dist.all_reduce(tensor)
        dist.all_reduce(tensor)

    original, dist.reduce = dist.reduce, made_of_another
    with CommLedger() as outer:
        dist.reduce(one, 0)
        with CommLedger() as inner:
            dist.all_reduce(one)
            kept = dist.all_reduce
        kept(one)
        all_gather_from_before(torch.zeros(SIZE), one)
        answer["inner"] = summarize(inner.take_counts())
        answer["outer"] = summarize(outer.take_counts())
    kept(one)
    dist.all_reduce(one)
    answer["after"] = summarize(add_counts(inner.take_counts(), outer.take_counts()))
    dist.reduce = original
    with CommLedger() as ledger:
        with dist._coalescing_manager(async_ops=True) as works:
            for _ in range(2):
                c10d.all_reduce(one)
        works.wait()
        answer["coalesced"] = summarize(ledger.take_counts())
    return answer


def test_nested_calls_count_once_and_kept_references_as_long_as_a_ledger_runs() -> None:
    for answer in run_on_ranks(nest_and_keep_references, dp=SIZE):
        name = "ranks 0,1,2"
        assert {k: v["calls"] for k, v in answer["inner"][name].items()} == {"all_reduce": 1}
        outer = {k: v["calls"] for k, v in answer["outer"][name].items()}
        # torch 2.13 makes the older name of this collective from the newer one: seen there even when looked up before.
        gathers = {"all_gather": 1} if hasattr(dist, "all_gather_single") else {}
        assert outer == {"reduce": 1, "all_reduce": 2, **gathers}
        assert answer["after"] == {}
        assert answer["coalesced"] == {name: {"all_reduce": {"calls": 2, "bytes": 8, "wire_bytes": pytest.approx(32 / 3)}}}


def time_a_late_rank(ctx: ParallelContext) -> dict[str, float]:
    """Seconds that the ledger and the wall count while the last rank comes late."""
    one = torch.ones(1)
    with CommLedger() as ledger:
        dist.barrier()
        ledger.take()
        if ctx.world.rank == SIZE - 1:
            time.sleep(LATE_S)
        start = time.perf_counter()
        dist.all_reduce(one)
        wall = time.perf_counter() - start
        return {"counted": ledger.take(), "wall": wall, "again": ledger.take()}


def test_seconds_show_that_a_peer_was_late() -> None:
    for rank, answer in enumerate(run_on_ranks(time_a_late_rank, dp=SIZE)):
        assert answer["counted"] <= answer["wall"]
        assert answer["wall"] - answer["counted"] < 0.25 * LATE_S
        # The late one does not wait; half of the delay is left for a busy machine.
        assert (answer["counted"] > 0.5 * LATE_S) == (rank != SIZE - 1)
        assert answer["again"] == 0


def test_a_summary_is_plain_json() -> None:
    counts = add_counts(
        {("tp", "send"): Traffic(2, 10, Fraction(10, 3))}, {("tp", "send"): Traffic(1, 5, Fraction(5, 3)), ("tp", "recv"): Traffic()}
    )
    assert json.loads(json.dumps(summarize(counts))) == {"tp": {"send": {"calls": 3, "bytes": 15, "wire_bytes": 5.0}}}


def test_an_all_reduce_is_its_two_halves_and_one_rank_sends_nothing() -> None:
    for n in (1, 2, 3, 8):
        assert wire_share("all_reduce", n) == wire_share("reduce_scatter", n) + wire_share("all_gather", n) == Fraction(2 * (n - 1), n)
    assert all(traffic(name, 1, 100) == Traffic() for name in COLLECTIVES)


def test_an_unknown_collective_is_refused() -> None:
    with pytest.raises(ValueError, match="collective 'allreduce' is unknown; it must be one of all_reduce, "):
        wire_share("allreduce", 2)
