"""A ladder of small runs: its design, its configs as the trainer reads them, its results read back."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from pathlib import Path

import pytest

from dist_llm.cli import plan_fit, plan_ladder
from dist_llm.config.load import load_config
from dist_llm.planning.budget import SpeedPoint
from dist_llm.planning.count import count_params
from dist_llm.planning.ladder import SHARES, Rung, design, seconds_of, within_flops, within_seconds
from dist_llm.utils.errors import ConfigError, DataError, ExitCode, UserError

SPEEDS = [SpeedPoint(32, 2, 6.5e5, 210_000.0), SpeedPoint(128, 6, 1.0e7, 43_000.0), SpeedPoint(256, 8, 4.5e7, 12_000.0)]


def make(run_flops: float, sizes: int = 6, spread: float = 10.0) -> list[Rung]:
    return design(run_flops, sizes=sizes, spread=spread, vocab_size=2048, seq_len=256, batch_size=16)


def ladder_command(*words: object) -> int:
    parser = argparse.ArgumentParser()
    plan_ladder.add_arguments(parser)
    return plan_ladder.run(parser.parse_args([str(w) for w in words]))


def test_sizes_spread_over_a_factor_of_eight_with_three_lengths_each() -> None:
    rungs = make(2e13)
    sizes = sorted({r.params for r in rungs})
    assert len(sizes) == 6 and len(rungs) == 18
    assert sizes[-1] / sizes[0] >= 8
    for size in sizes:
        mine = sorted((r for r in rungs if r.params == size), key=lambda r: r.tokens)
        for rung, share in zip(mine, SHARES, strict=True):
            assert rung.flops == pytest.approx(share * 2e13, rel=0.01)
            assert rung.params == count_params(rung.model).total
            assert rung.tokens == rung.steps * 16 * 256


def test_every_budget_has_models_too_small_and_too_large() -> None:
    rungs = make(2e13)
    for share in SHARES:
        ratios = [r.tokens / r.params for r in rungs if r.flops == pytest.approx(share * 2e13, rel=0.01)]
        assert max(ratios) > 40 > 10 > min(ratios)


@pytest.mark.parametrize("budget", [1e14, 2e14, 1e15])
def test_a_ladder_costs_its_budget(budget: float) -> None:
    assert sum(r.flops for r in within_flops(budget, make, 6)) == pytest.approx(budget, rel=0.02)


@pytest.mark.parametrize("seconds", [1200.0, 3000.0])
def test_a_ladder_takes_nearly_its_time_and_not_more(seconds: float) -> None:
    taken = sum(seconds_of(r, SPEEDS) for r in within_seconds(seconds, make, SPEEDS))
    assert 0.85 * seconds < taken <= seconds


def test_names_sort_by_size_and_then_length() -> None:
    rungs = make(2e13)
    by_name = sorted(rungs, key=lambda r: r.name)
    assert all((a.params, a.tokens) < (b.params, b.tokens) for a, b in itertools.pairwise(by_name))


@pytest.mark.parametrize(
    ("budget", "message"),
    [("1e10", "cannot be told apart|fewer than 50"), ("1e26", "cannot be told apart")],
)
def test_a_budget_without_a_ladder_is_refused(budget: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        within_flops(float(budget), make, 6)


def test_no_time_is_refused_with_what_would_do() -> None:
    with pytest.raises(ConfigError, match=r"no ladder fits 1 s at the speed measured; the shortest ladder takes \d+ s"):
        within_seconds(1.0, make, SPEEDS)


def test_written_configs_are_valid_and_say_all_they_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ladder"
    assert ladder_command("--budget", "2e14", "--out", out, "--json") == ExitCode.DONE
    answer = json.loads(capsys.readouterr().out)
    assert answer == json.loads((out / "ladder.json").read_text())
    configs = sorted(out.glob("*.yaml"))
    assert [str(c) for c in configs] == [row["config"] for row in answer["runs"]] and len(configs) == 18
    assert answer["flops"] == pytest.approx(2e14, rel=0.02)
    for path, row in zip(configs, answer["runs"], strict=True):
        config = load_config(path, ranks=1).config
        assert count_params(config.model).total == row["params"]
        assert config.train.steps * config.train.batch_size * config.data.seq_len == row["tokens"]
        assert config.directory == row["run"] == str(out / "runs" / path.stem)
        assert config.optim.schedule == "cosine" and config.optim.warmup_steps < config.train.steps
        assert "extends" not in path.read_text()


def test_a_directory_with_configs_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ladder_command("--budget", "2e14", "--out", tmp_path)
    capsys.readouterr()
    with pytest.raises(ConfigError, match=r"already holds configs \(n\d+-s\d+\.yaml, 18 in all\); choose another --out"):
        ladder_command("--budget", "4e14", "--out", tmp_path)


def test_the_vocabulary_is_that_of_the_corpus(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ladder"
    ladder_command("--budget", "2e13", "--out", out, "--data", corpus, "--spread", 8)
    said = capsys.readouterr()
    config = load_config(next(out.glob("*.yaml"))).config
    assert (config.model.vocab_size, config.data.path) == (512, str(corpus))
    assert "passes" in said.out and "beyond about 4 a token counts for less" in said.err
    with pytest.raises(ConfigError, match=r"--vocab-size 1000 is not that of .* \(512\)"):
        ladder_command("--budget", "2e13", "--out", tmp_path / "other", "--data", corpus, "--vocab-size", 1000)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (("--budget", "2e14"), ConfigError, "--out DIR is missing"),
        (("--budget", "much", "--out", "x"), ConfigError, "neither FLOPs"),
        (("--budget", "1.2.3h", "--out", "x"), ConfigError, "neither FLOPs"),
        (("--budget", "600", "--out", "x"), ConfigError, "for a time write 600s"),
        (("--budget", "40m", "--out", "x"), ConfigError, "bench speed"),
        (("--budget", "2e14", "--points", "2", "--out", "x"), ConfigError, "--points must be at least 3"),
        (("--budget", "2e14", "--ranks", "3", "--out", "x"), ConfigError, "does not divide over 3 ranks"),
        (("--budget", "2e14", "--lr", "0", "--out", "x"), ConfigError, "--lr must be a positive number"),
        (("--budget", "2e14", "--data", "nowhere", "--out", "x"), DataError, "there is no corpus at nowhere"),
        (("--read", "nowhere"), ConfigError, "nowhere holds no runs"),
    ],
)
def test_a_question_that_makes_no_ladder_is_refused(
    words: tuple[str, ...], kind: type[UserError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        ladder_command(*words)
    assert not (tmp_path / "x").exists()


def test_a_speed_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    path.write_text('{"ranks": 2}')
    with pytest.raises(DataError, match="is not what `dist-llm bench speed"):
        ladder_command("--budget", "40m", "--speed", path, "--out", tmp_path / "x")


def test_trained_runs_are_read_back_and_unfinished_ones_named(
    tmp_path: Path, corpus: Path, dist_llm, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ladder"
    ladder_command("--budget", "2e13", "--out", out, "--data", corpus, "--spread", 8)
    first, second = sorted(out.glob("*.yaml"))[:2]
    done = dist_llm("train", first, "train.steps=3", "optim.warmup_steps=1", "train.batch_size=2", "train.micro_batch_size=2")
    assert done.returncode == 0, done.stderr
    # One that was stopped half-way: what it leaves behind.
    unfinished, finished = out / "runs" / second.stem, out / "runs" / first.stem
    unfinished.mkdir()
    (unfinished / "config.resolved.yaml").write_text((finished / "config.resolved.yaml").read_text().replace("steps: 3", "steps: 9", 1))
    (unfinished / "metrics.jsonl").write_text((finished / "metrics.jsonl").read_text())
    capsys.readouterr()

    assert ladder_command("--read", out) == ExitCode.DONE
    said = capsys.readouterr()
    assert f"{unfinished} is left out: it is at step 3 of 9" in said.err
    (row,) = csv.DictReader((out / "ladder.csv").read_text().splitlines())
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert int(row["params"]) == count_params(load_config(first).config.model).total
    assert float(row["loss"]) == [r["loss"] for r in records if r["kind"] == "eval"][-1]
    assert int(row["tokens"]) == [r["tokens"] for r in records if r["kind"] == "train"][-1]

    # plan fit takes the folder as it is; one run is too few for a law.
    parser = argparse.ArgumentParser()
    plan_fit.add_arguments(parser)
    with pytest.raises(ConfigError, match="1 points are too few"):
        plan_fit.run(parser.parse_args([str(out)]))
