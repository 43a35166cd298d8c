"""``bench CASE`` for a kernel: its races under both allocators, as figures and as text."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from dist_llm.bench.answer import decode
from dist_llm.bench.kernels.race import is_less_accurate, run_race
from dist_llm.engine.launch import tune_allocator
from dist_llm.utils.errors import ConfigError, ExitCode, UserError

__all__ = ["PROGRESS", "RaceFailed", "case_as_text", "run_case", "run_in_process"]

PROGRESS = "bench: "  # how a line of progress on stderr begins
# glibc's own allocator is the second table of a page, and page faults make its races the longest.
_DEFAULT_MALLOC_ROUNDS = 3

Say = Callable[[str], None]


class RaceFailed(UserError):
    """The process of a race ended without an answer."""

    exit_code = ExitCode.INTERNAL


def _silent(line: str) -> None:
    del line


def run_case(
    name: str,
    device: torch.device,
    *,
    threads: int | None,
    rounds: int | None,
    malloc: str = "tuned",
    only: Collection[str] = (),
    times_only: bool = False,
    say: Say = _silent,
) -> dict[str, Any]:
    """Race case ``name``.

    Args:
        name: a key of ``bench.kernel_cases.KERNEL_CASES``.
        device: to race on.
        threads: CPU threads; None: torch's own choice.
        rounds: timed rounds, whose medians are reported; None: as ``run_race`` chooses.
        malloc: ``tuned`` keeps freed memory, as `dist-llm train` does; ``default`` takes glibc as it comes; ``both`` adds the second in a
            process of its own, since an allocator cannot be untuned, with at most three rounds and times only.
        only: peers to race; empty: all.
        times_only: no errors and no yardsticks.
        say: told of each race before it starts.

    Returns:
        the first race's answer (see ``run_race``) with "case", "malloc", "ok" and "races", the answers of all; with ``both`` also
        "default_malloc", the same of the other allocator.

    Raises:
        ConfigError: ``only`` names a peer that no race of the case has.
        RaceFailed: the process with the other allocator ended without an answer.
    """
    # Tuning sets a variable that torch reads: the untuned process gets the environment from before.
    untuned = dict(os.environ)
    if threads is not None:
        torch.set_num_threads(threads)
    if malloc != "default" and device.type == "cpu":
        tune_allocator()
    module = importlib.import_module(f"dist_llm.bench.kernels.{name}")
    races = module.races(device)
    known = list(dict.fromkeys(peer for race in races for peer in race.all_peers()))
    if unknown := [peer for peer in only if peer not in known]:
        raise ConfigError(f"--peer {unknown[0]}: {name} is raced against {', '.join(known) or 'nobody'}")
    answers: list[dict[str, Any]] = []
    for race in races:
        say(f"{name}: {race.title} ({len(answers) + 1} of {len(races)}), {'default' if malloc == 'default' else 'tuned'} malloc")
        answers.append(run_race(race, device, rounds=rounds, only=only, times_only=times_only))
    answer: dict[str, Any] = {
        **answers[0],
        "case": name,
        "malloc": "default" if malloc == "default" else "tuned",
        "torch": torch.__version__,
        "ok": not any(map(is_less_accurate, answers)),
        "races": answers,
    }
    if malloc == "both" and device.type == "cpu":
        answer["default_malloc"] = run_in_process(
            name,
            device,
            threads=threads,
            rounds=min(rounds or _DEFAULT_MALLOC_ROUNDS, _DEFAULT_MALLOC_ROUNDS),
            malloc="default",
            only=only,
            times_only=True,
            say=say,
            env=untuned,
        )
    return answer


def run_in_process(
    name: str,
    device: torch.device,
    *,
    threads: int | None,
    rounds: int | None,
    malloc: str,
    only: Collection[str] = (),
    times_only: bool = False,
    say: Say = _silent,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """``run_case`` in a process of its own, so that no case sees the memory and the compiled code of another.

    Args: as ``run_case``, and ``env``, the environment of the process; None: this one's.

    Raises:
        RaceFailed: the process ended without an answer.
    """
    words = ["bench", name, "--json", "--malloc", malloc, "--device", device.type]
    words += ["--rounds", str(rounds)] if rounds is not None else []
    words += ["--threads", str(threads)] if threads is not None else []
    words += ["--times-only"] if times_only else []
    words += [word for peer in only for word in ("--peer", peer)]
    command, messages = [sys.executable, "-m", "dist_llm", *words], []
    # Its answer goes to a file: with two pipes, the one that is not read could fill up and stop the process.
    with tempfile.TemporaryFile("w+") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(PROGRESS):
                say(line.removeprefix(PROGRESS).rstrip())
            else:
                messages.append(line)
        status = process.wait()
        out.seek(0)
        try:
            return decode(out.read())
        except ValueError:
            said = "".join(messages).strip()[-500:]
            raise RaceFailed(f"dist-llm {' '.join(words)} ended with status {status} and no answer: {said}") from None


def case_as_text(answer: dict[str, Any]) -> str:
    """The answer of ``run_case`` for a person."""
    first = answer["races"][0]
    lines = [f"{answer['case']}: {first['clock']}, {first['threads']} thread(s), {first['isa']}, {answer['malloc']} malloc"]
    for race in answer["races"]:
        lines += _race_lines(race)
    if other := answer.get("default_malloc"):
        lines.append(f"with glibc's own allocator, whose page faults are in the figures, {other['rounds']} rounds:")
        for race in other["races"]:
            lines += _race_lines(race)
    if not answer["ok"]:
        lines.append("ours is less accurate than the best peer")
    return "\n".join(lines)


def _race_lines(race: dict[str, Any]) -> Sequence[str]:
    versus = f", {race['ratio']:.2f} times the speed of {race['best_peer']}" if race["ratio"] else ""
    if race["goal"]:
        aim = f" over {', '.join(race['goal_against'])}" if race["goal_against"] else ""
        reached = f", {race['goal_ratio']:.2f} reached" if race["goal_against"] and race["goal_ratio"] else ""
        versus += f" (goal {race['goal']:g}{aim}{reached})"
    limit = f", {race['pct_of_ceiling']:.0f} % of the ceiling ({race['ceiling']})" if race["ceiling"] else ""
    rounded = f", of the copies {race['copies_err']:.2g}" if race["copies_err"] is not None else ""
    lines = [f"  {race['title']}: {race['ours_ms']:.3f} ms{versus}{limit}{_error(race, 'ours')}{rounded}"]
    for name, ms in race["peers"].items():
        lines.append(f"    {name:<22} {ms:10.3f} ms   ours {race['ratios'][name]:.2f} times as fast{_error(race, name)}")
    lines += [f"    {name:<22} {ms:10.3f} ms   (a yardstick{_error(race, name)})" for name, ms in race["yardsticks"].items()]
    return [*lines, f"    {race['notes']}"] if race["notes"] else lines


def _error(race: dict[str, Any], name: str) -> str:
    error = race["errors"].get(name)
    return "" if error is None else f", error {error:.2g}"
