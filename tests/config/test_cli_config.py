from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_llm.cli.main import main
from dist_llm.config.load import config_hash, load_config

from .configs import ROOT, SMALLEST, TINY, write

LLAMA = str(ROOT / "configs" / "tiny" / "llama.yaml")


def test_show_prints_a_config_that_loads_as_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", LLAMA, "optim.lr=2e-4", "log.wandb=off"]) == 0
    again = load_config(write(tmp_path, "again.yaml", capsys.readouterr().out))
    assert again.config == load_config(LLAMA, ["optim.lr=2e-4"]).config


def test_show_json_is_one_object_with_origins(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--json", LLAMA, "optim.lr=2e-4"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["config"]["optim"]["lr"] == 2e-4
    assert answer["origins"]["optim.lr"] == "command line"
    assert answer["files"] == [LLAMA]
    assert answer["hash"] == config_hash(load_config(LLAMA, ["optim.lr=2e-4"]).config)


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_validate_accepts_the_tiny_configs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate", str(path), "--ranks", "4"]) == 0
    assert capsys.readouterr().out == f"{path}: valid on 4 ranks\n"


def test_validate_prints_every_problem_on_its_own_line_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "a.yaml", SMALLEST + "  lrr: 1\nlog:\n  every: 0\n")
    assert main(["config", "validate", str(path), "seed=-1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"{path}:15: optim.lrr: unknown key; did you mean optim.lr?",
        f"{path}:17: log.every: 0 must be at least 1",
        "command line: seed: -1 must be at least 0",
    ]


def test_validate_json_names_file_line_key_and_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "a.yaml", SMALLEST + "  lrr: 1\n")
    assert main(["config", "validate", str(path), "--json"]) == 2
    problem = {"file": str(path), "line": 15, "key": "optim.lrr", "message": "unknown key", "nearest": "optim.lr"}
    assert json.loads(capsys.readouterr().out) == {"ok": False, "problems": [problem]}
    assert main(["config", "validate", LLAMA, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "problems": []}


def test_validate_refuses_a_batch_that_the_ranks_do_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate", LLAMA, "--ranks", "3"]) == 2
    assert "train.batch_size: 8 must be divisible by train.micro_batch_size (2) times ranks (3) = 6" in capsys.readouterr().err


def test_overrides_may_follow_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate", LLAMA, "name=x", "--ranks", "3", "train.batch_size=12"]) == 0
    assert main(["config", "validate", LLAMA, "--ranks", "4", "oops"]) == 2
    assert "'oops' is not an override" in capsys.readouterr().err


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["config", "validate", LLAMA, "--rank", "4", "--nonsense"])
    assert caught.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", ["0", "-2"])
def test_ranks_below_one_are_a_usage_error(ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate", LLAMA, f"--ranks={ranks}"]) == 2
    assert capsys.readouterr().err == f"dist-llm config: --ranks: {ranks} must be at least 1\n"


def test_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "RunConfig"


def test_config_without_a_sub_verb_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: dist-llm config") and "name one of show, validate, schema" in err


def test_help_names_the_sub_verbs_and_what_they_take(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, words in (([], ["show", "validate", "schema", "extends"]), (["validate"], ["CONFIG", "a.b=c", "--ranks", "--json"])):
        with pytest.raises(SystemExit) as caught:
            main(["config", *verb, "--help"])
        out = capsys.readouterr().out
        assert caught.value.code == 0 and all(word in out for word in words)


def test_the_command_ends_with_the_documented_code_and_no_traceback(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", SMALLEST + "  lrr: 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "dist_llm", "config", "show", str(path)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"dist-llm config: {path}:15: optim.lrr: unknown key; did you mean optim.lr?\n"


def test_help_does_not_import_pydantic() -> None:
    code = "import sys, dist_llm.cli.config; sys.exit('pydantic' in sys.modules or 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
