"""``bench CASE`` for a kernel: its races under both allocators, as figures and as text."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from typing import Any

import torch

from dist_llm.bench.kernels.race import is_less_accurate, run_race
from dist_llm.engine.launch import tune_allocator
from dist_llm.utils.errors import ConfigError

__all__ = ["case_as_text", "run_case", "run_in_process"]


def run_case(
    name: str, device: torch.device, *, threads: int | None, rounds: int, malloc: str = "tuned", only: Collection[str] = ()
) -> dict[str, Any]:
    """Race case ``name``.

    Args:
        name: a key of ``bench.kernel_cases.KERNEL_CASES``.
        device: to race on.
        threads: CPU threads; None: torch's own choice.
        rounds: timed rounds; medians are reported.
        malloc: ``tuned`` keeps freed memory, as `dist-llm train` does; ``default`` takes glibc as it comes; ``both`` adds the second in a
            process of its own, since an allocator cannot be untuned.
        only: peers to race; empty: all.

    Returns:
        the first race's answer (see ``run_race``) with "case", "malloc", "ok" and "races", the answers of all; with ``both`` also
        "default_malloc", the same of the other allocator.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if malloc != "default" and device.type == "cpu":
        tune_allocator()
    module = importlib.import_module(f"dist_llm.bench.kernels.{name}")
    answers = [run_race(race, device, rounds=rounds, only=only) for race in module.races(device)]
    answer: dict[str, Any] = {
        **answers[0],
        "case": name,
        "malloc": "default" if malloc == "default" else "tuned",
        "torch": torch.__version__,
        "ok": not any(map(is_less_accurate, answers)),
        "races": answers,
    }
    if malloc == "both" and device.type == "cpu":
        answer["default_malloc"] = run_in_process(name, device, threads=threads, rounds=rounds, malloc="default", only=only)
    return answer


def run_in_process(
    name: str, device: torch.device, *, threads: int | None, rounds: int, malloc: str, only: Collection[str] = ()
) -> dict[str, Any]:
    """``run_case`` in a process of its own, so that no case sees the memory and the compiled code of another."""
    words = ["bench", name, "--json", "--malloc", malloc, "--rounds", str(rounds), "--device", device.type]
    words += ["--threads", str(threads)] if threads is not None else []
    words += [word for peer in only for word in ("--peer", peer)]
    done = subprocess.run([sys.executable, "-m", "dist_llm", *words], capture_output=True, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise ConfigError(f"dist-llm {' '.join(words)} failed with status {done.returncode}: {done.stderr.strip()[-500:]}") from None
    return answer


def case_as_text(answer: dict[str, Any]) -> str:
    """The answer of ``run_case`` for a person."""
    first = answer["races"][0]
    lines = [f"{answer['case']}: {first['clock']}, {first['threads']} thread(s), {first['isa']}, {answer['malloc']} malloc"]
    for race in answer["races"]:
        lines += _race_lines(race)
    if other := answer.get("default_malloc"):
        lines.append("with glibc's own allocator, whose page faults are in the figures:")
        for race in other["races"]:
            lines += _race_lines(race)
    if not answer["ok"]:
        lines.append("ours is less accurate than the best peer")
    return "\n".join(lines)


def _race_lines(race: dict[str, Any]) -> Sequence[str]:
    goal = f" (goal {race['goal']:g})" if race["goal"] else ""
    versus = f", {race['ratio']:.2f} times the speed of {race['best_peer']}{goal}" if race["ratio"] else ""
    limit = f", {race['pct_of_ceiling']:.0f} % of the ceiling ({race['ceiling']})" if race["ceiling"] else ""
    lines = [f"  {race['title']}: {race['ours_ms']:.3f} ms{versus}{limit}, error {race['err']:.2g}"]
    lines += [f"    {name:<22} {ms:10.3f} ms   error {race['errors'][name]:.2g}" for name, ms in race["peers"].items()]
    lines += [f"    {name:<22} {ms:10.3f} ms   (a yardstick)" for name, ms in race["yardsticks"].items()]
    return [*lines, f"    {race['notes']}"] if race["notes"] else lines
