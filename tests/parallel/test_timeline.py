"""The timeline of real steps: its bubble beside theory, clocks of several nodes, and what a training run records and draws."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dist_llm.parallel.ranks import run_on_ranks
from dist_llm.parallel.timeline import clock_offsets
from dist_llm.report.html import write_report
from dist_llm.report.run import load_run
from dist_llm.report.timeline import StepTimeline, TimedAction, append_timeline, read_timelines
from dist_llm.topology.schedule import bubble_fraction, orders
from dist_llm.topology.simulate import simulate
from dist_llm.utils.errors import DataError
from tests.conftest import ROOT
from tests.engine.processes import complete, launched
from tests.parallel import pipeline_programs as programs

TOLERANCE = 0.03  # three points of the whole step: messages and waking up from a sleep take time, which theory has not


def simulated(schedule: str = "1f1b", p: int = 3, m: int = 4, v: int = 1, step: int = 3, spread: float = 0.0) -> StepTimeline:
    """A timeline as arithmetic gives it: forwards of 1 s, backwards of 2 s."""
    plan = simulate(orders(schedule, p, m, v), lambda _, action: 1.0 if action.kind == "F" else 2.0)
    actions = [
        TimedAction(10 + stage, stage, action.kind, action.micro, action.chunk, start, end)
        for stage in range(p)
        for action, start, end in zip(plan.orders[stage], plan.starts[stage], plan.ends[stage], strict=True)
    ]
    return StepTimeline(step, schedule, actions, spread)


@pytest.mark.parametrize(
    ("schedule", "pp", "chunks", "num_micro", "seconds"),
    [
        ("1f1b", 2, 1, 1, 0.1),
        ("1f1b", 2, 1, 8, 0.04),
        ("1f1b", 4, 1, 2, 0.08),
        ("1f1b", 4, 1, 4, 0.06),
        ("1f1b", 4, 1, 12, 0.03),
        ("interleaved", 2, 2, 4, 0.05),
        ("interleaved", 4, 2, 4, 0.04),
        ("interleaved", 4, 2, 8, 0.03),
    ],
)
def test_the_bubble_of_stages_of_fixed_cost_is_that_of_theory(schedule: str, pp: int, chunks: int, num_micro: int, seconds: float) -> None:
    # Whatever else runs on this machine can only delay a stage, so of three steps one may show what the executor can do.
    (found, *others) = run_on_ranks(
        programs.fixed_cost_steps, pp=pp, args=(schedule, chunks, num_micro, seconds, TOLERANCE, 3), deadline_s=60
    )
    assert not others[0] or len(others[0]) == len(found)
    theory = bubble_fraction(pp, num_micro, chunks)
    assert found[-1]["theory"] == theory
    assert abs(found[-1]["bubble"] - theory) <= TOLERANCE, [round(step["bubble"], 4) for step in found]
    actions = [TimedAction(**action) for action in found[-1]["actions"]]
    for stage in range(pp):
        mine = [a for a in actions if a.stage == stage]
        assert [(a.kind, a.micro, a.chunk) for a in mine] == orders(schedule, pp, num_micro, chunks)[stage]
        assert all(a.end_s - a.start_s >= (seconds if a.kind == "F" else 2 * seconds) for a in mine)
    # One clock: nothing starts before what it waits for has ended on the neighbour.
    ended = {(a.kind, a.micro, a.chunk * pp + a.stage): a.end_s for a in actions}
    for a in actions:
        virtual = a.chunk * pp + a.stage
        before = ended.get((a.kind, a.micro, virtual - 1 if a.kind == "F" else virtual + 1))
        assert before is None or a.start_s >= before


def test_only_the_main_ranks_pipeline_is_gathered() -> None:
    for answer in run_on_ranks(programs.timelines_beside_data_parallel, dp=2, pp=2):
        assert answer["ranks"] == (list(answer["pipeline"]) if 0 in answer["pipeline"] else None)


def test_clocks_of_nodes_are_aligned_by_meetings_to_the_jitter_of_leaving_them() -> None:
    chance = random.Random(4)
    nodes, ahead = ["a", "a", "b", "b", "c"], {"a": 0.0, "b": 5e4, "c": -3.25}
    meetings = [[float(i) + ahead[node] + chance.uniform(0, 1e-4) for i in range(9)] for node in nodes]
    meetings[2][3] += 0.5  # one rank left one meeting late
    meetings[4][6] += 0.5
    offsets, spread = clock_offsets(nodes, meetings)
    assert offsets[0] == offsets[1] == 0
    assert offsets[2] == offsets[3] == pytest.approx(5e4, abs=1e-4)
    assert offsets[4] == pytest.approx(-3.25, abs=1e-4)
    assert 0 < spread <= 1e-4


@pytest.mark.parametrize("ahead_s", [5e4, -300.0])
def test_stages_on_machines_with_other_clocks_are_drawn_on_one(ahead_s: float) -> None:
    timeline = run_on_ranks(programs.stages_on_two_machines, pp=2, args=(ahead_s,))[0]
    actions = {(a["stage"], a["kind"], a["micro"]): a for a in timeline["actions"]}
    assert min(a["start_s"] for a in timeline["actions"]) == actions[0, "F", 0]["start_s"] == 0
    assert 0 < timeline["clock_spread_s"] < 0.05
    # Half a forward: on a busy machine ranks may leave a barrier some milliseconds apart.
    slack = 0.025
    for micro in (0, 1):
        assert actions[1, "F", micro]["start_s"] > actions[0, "F", micro]["end_s"] - slack
        assert actions[0, "B", micro]["start_s"] > actions[1, "B", micro]["end_s"] - slack
    # p = m = 2: three slots of a forward and a backward, 0.15 s each.
    assert max(a["end_s"] for a in timeline["actions"]) == pytest.approx(0.45, abs=0.2)


def test_bubble_and_makespan_are_those_of_arithmetic() -> None:
    for schedule, p, m, v in (("1f1b", 3, 4, 1), ("interleaved", 4, 8, 2)):
        timeline = simulated(schedule, p, m, v)
        assert (timeline.num_stages, timeline.num_micro, timeline.num_chunks) == (p, m, v)
        assert timeline.makespan_s == 3 * (v * m + p - 1)
        assert timeline.bubble == pytest.approx(bubble_fraction(p, m, v), abs=1e-12)
        assert timeline.bubble_theory == bubble_fraction(p, m, v)


def test_a_step_recorded_twice_is_read_as_it_was_the_last_time(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    assert read_timelines(path) == []
    for timeline in (simulated(step=6), simulated(step=3), simulated(step=6, m=5, spread=1e-5)):
        append_timeline(path, timeline)
    with path.open("ab") as f:
        f.write(b'{"step": 9, "sched')  # killed while writing
    assert read_timelines(path) == [simulated(step=3), simulated(step=6, m=5, spread=1e-5)]
    append_timeline(path, simulated(step=9))
    assert [t.step for t in read_timelines(path)] == [3, 6, 9]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"step": 1, "schedule": "1f1b", "clock_spread_s": 0, "actions": []}', "no actions"),
        ('{"step": 1, "schedule": "1f1b", "clock_spread_s": 0}', "'actions' is missing"),
        (
            '{"step": 1, "schedule": "1f1b", "clock_spread_s": 0, "actions": [{"rank": 0, "stage": 0, "kind": "F", "micro": 0, "chunk": 0, "start_s": 2, "end_s": 1}]}',
            "an end after its start",
        ),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "timeline.jsonl"
    append_timeline(path, simulated())
    with path.open("a") as f:
        f.write(line + "\n")
    with pytest.raises(DataError, match=rf"timeline.jsonl, record 2: .*{says}.*remove the line"):
        read_timelines(path)


@pytest.mark.parametrize(
    ("schedule", "p", "m", "v"), [("1f1b", 4, 8, 1), ("interleaved", 2, 4, 2), ("1f1b", 40, 3, 1), ("1f1b", 8, 600, 1)]
)
def test_the_report_draws_the_last_recorded_step_beside_theory(tmp_path: Path, schedule: str, p: int, m: int, v: int) -> None:
    (tmp_path / "events.jsonl").touch()
    append_timeline(tmp_path / "timeline.jsonl", simulated(step=3))
    append_timeline(tmp_path / "timeline.jsonl", simulated(schedule, p, m, v, step=11, spread=2e-4))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert (tmp_path / "plots" / "pipeline.png").read_bytes().startswith(b"\x89PNG")
    theory = bubble_fraction(p, m, v)
    assert f"pipeline bubble; {theory:.1%} in theory" in page and f"<dd>{theory:.1%}</dd>" in page
    assert f"Schedule {schedule}: {p} stages" in page and f"{m} micro-batches" in page
    assert "aligned to about 0.2 ms" in page and "Over the 2 recorded steps" in page
    assert ("The first 8000 of 9600 actions are drawn." in page) == (2 * p * m * v > 8000)
    drawing = page[page.index("caption-pipeline") : page.index('id="caption-pipeline"')]
    for colour in ("blue", "orange"):
        assert f"var(--{colour})" in drawing
    assert ("var(--page)" in drawing) == (m < 600), "numbers are in bars that have room for them"
    assert len(page) < 2_000_000


def test_a_training_run_with_stages_records_its_third_step_and_those_asked_for(tmp_path: Path, corpus: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = launched(
        ROOT / "configs/tiny/llama.yaml", f"data.path={corpus}", f"run_dir={run_dir}", "parallel.pp=2", "train.steps=10",
        "train.batch_size=6", "log.timeline_every=5", "eval.rows=2", launcher="torchrun",
    )  # fmt: skip
    assert complete(command, log) == 0, log.read_text(encoding="utf-8")[-3000:]
    timelines = load_run(run_dir).timelines
    assert [t.step for t in timelines] == [3, 5, 10]
    step_s = {r["step"]: r["step_s"] for r in map(json.loads, (run_dir / "metrics.jsonl").open()) if r["kind"] == "train"}
    for timeline in timelines:
        assert (timeline.schedule, timeline.num_stages, timeline.num_micro, timeline.clock_spread_s) == ("1f1b", 2, 3, 0.0)
        assert {(a.stage, a.rank) for a in timeline.actions} == {(0, 0), (1, 1)}
        assert [(a.kind, a.micro, a.chunk) for a in timeline.actions if a.stage == 1] == orders("1f1b", 2, 3)[1]
        assert min(a.start_s for a in timeline.actions) == 0
        # The pipeline is a part of the step of the main rank, which waits for the others before and after it.
        assert 0 < timeline.makespan_s < step_s[timeline.step]
        assert 0 < timeline.bubble < 1
