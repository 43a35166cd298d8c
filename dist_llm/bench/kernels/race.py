"""Running the races: contestants in turns, medians, the ceiling of the same run, errors against float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from statistics import median
from typing import Any

import torch

from dist_llm.bench.kernels.case import Race, relative_errors
from dist_llm.kernels.extension import load_extension
from dist_llm.utils.errors import ConfigError

__all__ = ["is_less_accurate", "run_race"]

_STRETCH_S = 0.02  # a timed stretch is at least this long: below, the clock and the caches of the one before count too much
_WARM_UP = 3
_GEMM = 1024
# Two equally careful programs in bf16 differ by this much, depending on which way they happen to round.
_SLACK = 1.1


def run_race(race: Race, device: torch.device, *, rounds: int, only: Collection[str] = ()) -> dict[str, Any]:
    """Time every contestant of ``race``, or of its peers ``only`` these.

    On CPU with one thread the clock is the CPU time of the process: it repeats on a shared machine, where wall time does not. On a GPU it is
    the device's own events.

    Returns:
        ``{"title", "ours_ms", "peers": {name: ms}, "yardsticks": {name: ms}, "best_peer", "ratio", "ceiling_ms", "ceiling",
        "pct_of_ceiling", "err", "peer_err", "errors": {name: number}, "goal", "notes", "clock", "threads", "isa"}``.
        ``ratio`` is the best peer's time over ours; ``err`` and ``peer_err`` are ours and the best peer's.
    """
    peers: dict[str, Callable[..., Any]] = {}
    if race.eager is not None:
        peers["eager"] = race.eager
        if race.compiles:
            torch._dynamo.reset()
            peers["compile"] = torch.compile(race.eager)
    peers |= race.peers
    if only:
        if unknown := sorted(set(only) - set(peers)):
            raise ConfigError(f"--peer {unknown[0]}: this race has {', '.join(peers)}")
        peers = {name: fn for name, fn in peers.items() if name in only}
    errors = relative_errors(race, {"ours": race.ours, **peers})
    ceilings = _ceilings(race, device)
    work = {name: race.call(fn) for name, fn in {"ours": race.ours, **peers, **race.yardsticks}.items()}
    ms = _interleaved({**work, **ceilings}, device, rounds)
    best = min(peers, key=lambda name: ms[name]) if peers else None
    # Memory and products can overlap in principle, so the ceiling is the larger of the two, not their sum.
    ceiling_ms = {name: ms[name] * scale for name, scale in _scales(race).items()}
    limit = max(ceiling_ms, key=lambda name: ceiling_ms[name]) if ceiling_ms else None
    return {
        "title": race.title,
        "ours_ms": ms["ours"],
        "peers": {name: ms[name] for name in peers},
        "yardsticks": {name: ms[name] for name in race.yardsticks},
        "best_peer": best,
        "ratio": ms[best] / ms["ours"] if best else None,
        "ceiling": limit,
        "ceiling_ms": ceiling_ms[limit] if limit else None,
        "pct_of_ceiling": 100 * ceiling_ms[limit] / ms["ours"] if limit else None,
        "err": errors["ours"],
        "peer_err": errors[best] if best else None,
        "errors": errors,
        "goal": race.goal,
        "notes": race.notes,
        "clock": "device events" if device.type == "cuda" else "process CPU time" if torch.get_num_threads() == 1 else "wall time",
        "threads": torch.get_num_threads(),
        "isa": load_extension().cpu_isa if device.type == "cpu" else torch.cuda.get_device_name(device),
    }


def is_less_accurate(answer: Mapping[str, Any]) -> bool:
    """Whether ours is further from float64 than the best peer, beyond luck of rounding."""
    return answer["peer_err"] is not None and answer["err"] > _SLACK * answer["peer_err"] and answer["err"] > 1e-6


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


def _interleaved(work: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    for fn in work.values():
        for _ in range(_WARM_UP):
            fn()
    calls = {name: max(1, int(_STRETCH_S / max(1e-6, _seconds(fn, device, 1)))) for name, fn in work.items()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for n in range(rounds):
        # A-B-C, then C-B-A: what a neighbour on the machine does hits all of them alike.
        for name in list(work) if n % 2 == 0 else list(work)[::-1]:
            times[name].append(_seconds(work[name], device, calls[name]) / calls[name])
    return {name: 1000 * median(values) for name, values in times.items()}


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
