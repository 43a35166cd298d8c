from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_llm.cli import plan
from dist_llm.utils.errors import DataError, ExitCode, StorageError

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "data" / "published_runs.csv"


def answer(*words: object) -> int:
    parser = argparse.ArgumentParser(prog="dist-llm plan")
    plan.add_arguments(parser)
    return plan.run(parser.parse_args([str(w) for w in words]))


def test_json_has_every_row_once_predicted_or_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer("predict", TABLE, "--json") == ExitCode.DONE
    said = json.loads(capsys.readouterr().out)
    assert len(said["rows"]) + len(said["skipped"]) == 339
    for row in said["rows"]:
        assert set(row) == {"id", "predicted", "measured", "unit", "rel_err"}
        assert row["rel_err"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    assert all(set(entry) == {"id", "reason"} for entry in said["skipped"])


def test_text_ends_with_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer("predict", TABLE) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("329 rows: median error")
    assert "skipped mlm-h100-177B-strong-96: tp is not given" in lines


def test_a_plot_is_drawn_in_the_asked_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer("predict", TABLE, "--json", "--plot", tmp_path / "runs.svg") == ExitCode.DONE
    assert "<svg" in (tmp_path / "runs.svg").read_text(encoding="utf-8")
    json.loads(capsys.readouterr().out)  # messages go to stderr


def test_a_plot_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must end in \.png"):
        answer("predict", TABLE, "--plot", tmp_path / "runs.bmp")
    with pytest.raises(StorageError, match="cannot write"):
        answer("predict", TABLE, "--plot", tmp_path / "nowhere" / "runs.png")


def test_a_table_without_a_row_to_predict_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("id,hardware,measured,unit\na,abacus,1,s/iter\n", encoding="utf-8")
    assert answer("predict", path, "--json") == ExitCode.DONE
    said = json.loads(capsys.readouterr().out)
    assert said == {"rows": [], "skipped": [{"id": "a", "reason": "no cluster description for hardware 'abacus'"}], "summary": None}
    with pytest.raises(DataError, match="nothing to draw"):
        answer("predict", path, "--plot", tmp_path / "runs.png")


def test_a_sub_verb_whose_module_is_missing_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(plan.SUBVERBS, "dream", ("plan what is not there", "dist_llm.cli.plan_dream"))
    assert answer("predict", TABLE, "--json") == ExitCode.DONE
    capsys.readouterr()
    with pytest.raises(SystemExit):
        answer("dream")


def test_without_a_search_a_bare_plan_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plan, "SEARCH", "dist_llm.cli.no_search")
    assert answer() == ExitCode.USAGE
    assert "say what to plan" in capsys.readouterr().err


def test_declaring_the_arguments_loads_nothing_heavy() -> None:
    code = (
        "import argparse, sys; from dist_llm.cli import plan; plan.add_arguments(argparse.ArgumentParser());"
        "print([m for m in ('torch', 'numpy', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
