from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dist_llm.models.block
import dist_llm.models.decoder
import dist_llm.optim.adamw
from dist_llm.bench.coord_check import FLAT, check_coordinates, default_widths, model_at
from dist_llm.cli.main import main
from dist_llm.config.load import load_config
from dist_llm.config.schema import RunConfig
from dist_llm.planning.mup import Scaling
from dist_llm.utils.errors import ConfigError, ExitCode

ROOT = Path(__file__).parents[2]
LLAMA = str(ROOT / "configs" / "tiny" / "llama.yaml")
WIDTHS = [32, 64, 128]


def config_of(tiny: str = "llama", *overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / "tiny" / f"{tiny}.yaml", ["model.num_layers=2", *overrides]).config


def check(config: RunConfig, **options: Any) -> dict[str, Any]:
    return check_coordinates(config, **{"widths": WIDTHS, "steps": 5, "seeds": 1, "threads": 1, **options})


@pytest.mark.parametrize("tiny", ["llama", "gpt2"])
def test_under_mup_slopes_are_flat_and_without_it_they_grow(tiny: str) -> None:
    answer = check(config_of(tiny))
    assert answer["ok"], answer["worst"]
    standard = answer["standard"]["slopes"]["change"]
    # With one rate for all widths a sum over updates grows with the width: a slope of 1, less where something saturates (attention
    # of the first block, whose logits have moved too far already).
    grown = ("mlp 0", "mlp 1", "scores 0", "logits")
    assert all(standard[part] > FLAT for part in grown), standard
    assert max(standard.values()) > 0.8
    # At the base width both are one model.
    for part in answer["parts"]:
        assert answer["standard"]["change"][part][0] == answer["mup"]["change"][part][0]


def test_more_heads_of_one_size_are_flat_as_well() -> None:
    config = config_of("llama", "model.head_dim=8", "model.num_heads=8", "model.num_kv_heads=4")
    answer = check(config)
    assert answer["ok"], answer["worst"]


@pytest.mark.parametrize(
    ("module", "name", "without", "part"),
    [
        (dist_llm.optim.adamw, "parameter_scaling", lambda *_: Scaling(1, 1, 1, 1), "mlp"),
        (dist_llm.models.decoder, "parameter_scaling", lambda *_: Scaling(1, 1, 1, 1), "mlp"),
        (dist_llm.models.decoder, "output_multiplier", lambda _: 1.0, "logits"),
        (dist_llm.models.block, "score_scale", lambda model: model.head_size**-0.5, "scores"),
    ],
    ids=["rate", "initial weights", "logits", "scores"],
)
def test_a_factor_that_is_missing_shows_as_a_slope(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, without: Any, part: str
) -> None:
    monkeypatch.setattr(module, name, without)
    answer = check(config_of())
    assert not answer["ok"]
    assert answer["worst"]["part"].startswith(part), answer["worst"]


def test_a_model_keeps_its_proportions_at_another_width() -> None:
    model = config_of("llama").model  # 64 wide, 4 heads of 16 over 2, MLP of 192
    wide = model_at(model, 128, base_width=32)
    assert (wide.num_heads, wide.kv_heads, wide.head_size, wide.ffn_size, wide.mup_base_width) == (4, 2, 32, 384, 32)
    fixed = model_at(model.model_copy(update={"head_dim": 16}), 128, base_width=None)
    assert (fixed.num_heads, fixed.kv_heads, fixed.head_size, fixed.mup_base_width) == (8, 4, 16, None)


def test_default_widths_are_those_that_the_heads_allow() -> None:
    model = config_of("llama").model
    assert default_widths(model) == [32, 64, 128, 256]
    assert default_widths(model.model_copy(update={"num_heads": 12, "num_kv_heads": None})) == [48, 96, 192, 384]
    # 6 heads of 16, 3 of keys: the smallest width is that of 2 over 1.
    assert default_widths(model.model_copy(update={"d_model": 96, "num_heads": 6, "num_kv_heads": 3, "head_dim": 16})) == [32, 64, 128, 256]
    for width in default_widths(model.model_copy(update={"d_model": 96, "num_heads": 6, "num_kv_heads": 3, "head_dim": 16})):
        model_at(model.model_copy(update={"d_model": 96, "num_heads": 6, "num_kv_heads": 3, "head_dim": 16}), width, base_width=32)


def test_a_width_that_heads_do_not_fill_is_refused_with_those_that_would() -> None:
    model = config_of("llama").model.model_copy(update={"head_dim": 16})
    with pytest.raises(ConfigError, match=r"--widths 40: model.num_heads 4 at d_model 64 becomes 2.5.*multiples of 16"):
        model_at(model, 40, base_width=None)
    with pytest.raises(ConfigError, match=r"--widths 36: model.position.*must be even"):
        check(config_of(), widths=[32, 36])


def test_the_command_draws_and_answers_with_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "coords.png"
    words = [LLAMA, "model.num_layers=2", "--widths", "32,64,128", "--seeds", "1", "--threads", "1", "--plot", str(plot), "--json"]
    assert main(["bench", "coord-check", *words]) == ExitCode.DONE
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] and answer["widths"] == WIDTHS and answer["base_width"] == 32
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--widths", "32"], "--widths 32 must name at least two different widths"),
        (["--widths", "32;64"], "--widths 32;64 must be whole numbers with commas"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--plot", "coords.txt"], "--plot coords.txt must end in .png, .svg, .pdf"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "coord-check", LLAMA, *words]) == ExitCode.USAGE
    assert message in capsys.readouterr().err
