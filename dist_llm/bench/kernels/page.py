"""The table of docs/benchmarks/kernels.md, written from the answers of the races."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_llm import __version__

__all__ = ["kernels_page"]

_HEAD = (
    "| forward and backward | ours, ms | peers, ms (times ours) | beside, ms | best peer / ours | goal | % of ceiling | err | err of best peer |\n"
    + "| --- " * 9
    + "|"
)


def kernels_page(answers: Sequence[dict[str, Any]]) -> str:
    """Markdown: one table for each allocator that was raced, with the machine, the versions and the commit."""
    first, said = answers[0], set[str]()
    lines = [
        "# Kernels",
        "",
        "Written by `dist-llm bench --all`; one case again: `dist-llm bench CASE`.",
        "",
        f"{_processor()}, {first['isa']}, {first['threads']} thread(s), {first['clock']}, medians of {_rounds(answers)} interleaved rounds; torch {first['torch']}; "
        f"{_commit()}; {datetime.date.today().isoformat()}.",
        "",
        "Ceiling: the time of a copy that moves the same bytes, or of bf16 products of 1024 x 1024 with the same FLOPs, in the same run; the larger. "
        "A result above 100 % found its tensors in a cache. err: largest of ||r - r64|| / ||r64|| over outputs and gradients, r64 from the reference in float64. "
        "Peers: in parentheses their time over ours. Beside: timed for orientation, no ratio is claimed. Goal: over the best peer, or over those it names.",
    ]
    lines += _table("The allocator as `train` sets it" if first["malloc"] == "tuned" else "glibc's own allocator", answers, said)
    if others := [answer["default_malloc"] for answer in answers if "default_malloc" in answer]:
        lines += _table(
            f"glibc's own allocator: page faults of large results count; medians of {_rounds(others)} rounds, times only: errors are those above",
            others,
            said,
        )
    return "\n".join(lines) + "\n"


def _table(title: str, answers: Sequence[dict[str, Any]], said: set[str]) -> list[str]:
    """The table and its notes, but for those that have been ``said``; they are then."""
    races = [race for answer in answers for race in answer["races"]]
    titles: dict[str, list[str]] = {}
    for race in races:
        titles.setdefault(race["notes"], []).append(race["title"])
    notes = [f"- {'; '.join(those)}: {note}" for note, those in titles.items() if note and note not in said]
    said.update(titles)
    return ["", f"## {title}", "", _HEAD, *map(_row, races), *([""] if notes else []), *notes]


def _row(race: dict[str, Any]) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def error(kind: str) -> str:
        rounded = race[f"copies_{kind}"]
        return number(race[kind], ".1e") + ("" if rounded is None else f", copies {rounded:.1e}")

    # Names may have commas in them.
    peers = "; ".join(f"{name} {ms:.3g} ({race['ratios'][name]:.2f})" for name, ms in race["peers"].items())
    beside = "; ".join(f"{name} {ms:.3g}" for name, ms in race["yardsticks"].items())
    goal = number(race["goal"], "g")
    if race["goal_against"]:
        goal += f" over {', '.join(race['goal_against'])}: {number(race['goal_ratio'], '.2f')}"
    return (
        f"| {race['title']} | {race['ours_ms']:.3g} | {peers} | {beside} | {number(race['ratio'], '.2f')} | {goal} | "
        f"{number(race['pct_of_ceiling'], '.0f')} | {error('err')} | {error('peer_err')} |"
    )


def _rounds(answers: Sequence[dict[str, Any]]) -> str:
    counts = {race["rounds"] for answer in answers for race in answer["races"]}
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of a checkout, or the version of an installed package."""
    root = Path(__file__).resolve().parents[3]
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return f"dist_llm {__version__}"
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else f"dist_llm {__version__}"
