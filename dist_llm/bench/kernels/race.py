"""Running the races: contestants in turns, medians, the ceiling of the same run, errors against float64."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from statistics import median
from typing import Any

import torch

from dist_llm.bench.kernels.case import Race, relative_errors
from dist_llm.kernels.extension import load_extension

__all__ = ["is_less_accurate", "run_race"]

_STRETCH_S = 0.02  # a timed stretch is at least this long: below, the clock and the caches of the one before count too much
_WARM_UP = 3
_SLOW_S = 0.2  # from here on a call warms up nothing that the next would miss
_ROUNDS, _MIN_ROUNDS, _ROUNDS_S = 9, 3, 20.0  # unless told: nine rounds, but of the longest races no more than fit into 20 seconds
_GEMM = 1024
# Two equally careful programs in bf16 differ by this much, depending on which way they happen to round.
_SLACK = 1.1


def run_race(
    race: Race, device: torch.device, *, rounds: int | None = None, only: Collection[str] = (), times_only: bool = False
) -> dict[str, Any]:
    """Time every contestant of ``race``, or of its peers ``only`` these, if it has them.

    On CPU with one thread the clock is the CPU time of the process: it repeats on a shared machine, where wall time does not. On a GPU it is
    the device's own events. Without ``rounds`` there are nine, fewer (at least three) where a round takes seconds. With ``times_only``
    there are neither errors, which are None, nor definitions and yardsticks.

    Returns:
        ``{"title", "ours_ms", "peers": {name: ms}, "yardsticks": {name: ms}, "best_peer", "ratio", "ratios": {name: number}, "ceiling_ms",
        "ceiling", "pct_of_ceiling", "err", "peer_err", "errors": {name: number}, "copies_err", "copies_peer_err", "goal", "goal_against",
        "goal_ratio", "notes", "rounds", "clock", "threads", "isa"}``.
        ``ratio`` is the best peer's time over ours, ``goal_ratio`` that of the best peer the goal is about; ``err`` and ``peer_err`` are
        ours and the best peer's, or without peers the fastest definition's. Definitions are timed among the yardsticks.
    """
    if not race.why_not_compiled:
        torch._dynamo.reset()
    peers = {name: fn for name, fn in race.all_peers().items() if not only or name in only}
    definitions = {} if times_only else race.definitions
    beside = {} if times_only else {**race.definitions, **race.yardsticks}
    errors = {} if times_only else relative_errors(race, {"ours": race.ours, **peers, **definitions})
    ceilings = _ceilings(race, device)
    work = {name: race.call(fn) for name, fn in {"ours": race.ours, **peers, **beside}.items()}
    ms, rounds_run = _interleaved({**work, **ceilings}, device, rounds)
    # Whoever finds no finite numbers has computed nothing, however fast.
    able = [name for name in peers if times_only or math.isfinite(errors[name].results)]
    best = _fastest(able, ms)
    ratios = {name: ms[name] / ms["ours"] for name in peers}
    aim = _fastest([name for name in able if not race.goal_against or name in race.goal_against], ms) if race.goal else None
    own, theirs = errors.get("ours"), errors.get(best or _fastest(definitions, ms) or "")
    # Memory and products can overlap in principle, so the ceiling is the larger of the two, not their sum.
    ceiling_ms = {name: ms[name] * scale for name, scale in _scales(race).items()}
    limit = max(ceiling_ms, key=lambda name: ceiling_ms[name]) if ceiling_ms else None
    shortened = f"medians of {rounds_run} rounds, since each takes seconds" if rounds is None and rounds_run < _ROUNDS else ""
    not_compiled = f"torch.compile does not race: {race.why_not_compiled}" if race.why_not_compiled else ""
    return {
        "title": race.title,
        "ours_ms": ms["ours"],
        "peers": {name: ms[name] for name in peers},
        "yardsticks": {name: ms[name] for name in beside},
        "best_peer": best,
        "ratio": ratios[best] if best else None,
        "ratios": ratios,
        "ceiling": limit,
        "ceiling_ms": ceiling_ms[limit] if limit else None,
        "pct_of_ceiling": 100 * ceiling_ms[limit] / ms["ours"] if limit else None,
        "err": own.results if own else None,
        "peer_err": theirs.results if theirs else None,
        "errors": {name: error.results for name, error in errors.items()},
        "copies_err": own.copies if own else None,
        "copies_peer_err": theirs.copies if theirs else None,
        "goal": race.goal,
        "goal_against": list(race.goal_against),
        "goal_ratio": ratios[aim] if aim else None,
        "notes": "; ".join(filter(None, (race.notes, not_compiled, shortened))),
        "rounds": rounds_run,
        "clock": "device events" if device.type == "cuda" else "process CPU time" if torch.get_num_threads() == 1 else "wall time",
        "threads": torch.get_num_threads(),
        "isa": load_extension().cpu_isa if device.type == "cpu" else torch.cuda.get_device_name(device),
    }


def is_less_accurate(answer: Mapping[str, Any]) -> bool:
    """Whether ours is further from float64 than the best peer, beyond luck of rounding; in its results or in their rounded copies."""
    return any(_is_further(answer.get(f"{kind}err"), answer.get(f"{kind}peer_err")) for kind in ("", "copies_"))


def _is_further(ours: float | None, theirs: float | None) -> bool:
    if ours is None:
        return False
    # A comparison with NaN is False, whichever way it is written.
    return not math.isfinite(ours) or (theirs is not None and ours > _SLACK * theirs and ours > 1e-6)


def _fastest(names: Iterable[str], ms: Mapping[str, float]) -> str | None:
    return min(names, key=lambda name: ms[name], default=None)


def _ceilings(race: Race, device: torch.device) -> dict[str, Callable[[], Any]]:
    made: dict[str, Callable[[], Any]] = {}
    if race.moved_bytes:
        # A copy reads a byte for each it writes, so half of the traffic is its source.
        source = torch.ones(max(1, race.moved_bytes // 8), dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        made["copy bandwidth"] = lambda: target.copy_(source)
    if race.flops:
        dtype = next(a.dtype for a in race.args if isinstance(a, torch.Tensor) and a.is_floating_point())
        a, b = (torch.randn(_GEMM, _GEMM, device=device).to(dtype) for _ in range(2))
        made["matrix product"] = lambda: torch.mm(a, b)
    return made


def _scales(race: Race) -> dict[str, float]:
    scales = {"copy bandwidth": 1.0} if race.moved_bytes else {}
    return {**scales, "matrix product": race.flops / (2 * _GEMM**3)} if race.flops else scales


def _interleaved(work: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int | None) -> tuple[dict[str, float], int]:
    """Median milliseconds of each, and of how many rounds."""
    calls: dict[str, int] = {}
    round_s = 0.0
    for name, fn in work.items():
        once = 0.0
        for n in range(_WARM_UP + 1):
            once = _seconds(fn, device, 1)
            if n > 0 and once > _SLOW_S:
                break
        calls[name] = max(1, int(_STRETCH_S / max(1e-6, once)))
        round_s += calls[name] * once
    if rounds is None:
        rounds = max(_MIN_ROUNDS, min(_ROUNDS, int(_ROUNDS_S / max(1e-6, round_s))))
    times: dict[str, list[float]] = {name: [] for name in work}
    for n in range(rounds):
        # A-B-C, then C-B-A: what a neighbour on the machine does hits all of them alike.
        for name in list(work) if n % 2 == 0 else list(work)[::-1]:
            times[name].append(_seconds(work[name], device, calls[name]) / calls[name])
    return {name: 1000 * median(values) for name, values in times.items()}, rounds


def _seconds(fn: Callable[[], Any], device: torch.device, calls: int) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(calls):
            fn()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    for _ in range(calls):
        fn()
    return clock() - begin
