from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.config.keys import KEYS, SYNONYMS, nearest_key
from dist_llm.config.load import ConfigErrors, load_config
from dist_llm.config.write import scalar
from dist_llm.utils.errors import ConfigError, ExitCode

from .configs import ROOT, SMALLEST, TINY, problems_of, the_problem, write


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_tiny_configs_state_their_values_and_load_without_data(path: Path) -> None:
    resolved = load_config(path)
    assert resolved.config.data.path is None
    assert sum(origin != "default" for origin in resolved.origins.values()) >= 20
    assert [problems_of(path, ranks=ranks) for ranks in (1, 2, 4)] == [[], [], []]


def test_tiny_configs_are_the_four_that_the_readme_lists() -> None:
    readme = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    assert [path.stem for path in TINY] == ["banded", "gpt2", "llama", "packed"]
    assert all(f"`tiny/{path.name}`" in readme for path in TINY)


def test_an_override_wins_over_every_file(smallest: Path) -> None:
    resolved = load_config(smallest, ["optim.lr=3e-4", "log.wandb=off", "optim.lr=5e-4", "data.path=null", "name=a"])
    assert (resolved.config.optim.lr, resolved.config.log.wandb, resolved.config.name) == (5e-4, "off", "a")
    assert resolved.origins["optim.lr"] == resolved.origins["log.wandb"] == "command line"
    assert resolved.origins["train.steps"] == f"{smallest}:10"


def test_an_override_may_hold_several_keys_of_a_section(smallest: Path) -> None:
    config = load_config(smallest, ["optim={lr: 2e-3, eps: 1e-6}"]).config
    assert (config.optim.lr, config.optim.eps) == (2e-3, 1e-6)


def test_off_and_3e_4_mean_what_they_say_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", SMALLEST.replace("1e-3", "3e-4") + "log: {wandb: off, tensorboard: yes}\n")
    config = load_config(path).config
    assert (config.optim.lr, config.log.wandb, config.log.tensorboard) == (3e-4, "off", True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("lr=1", "lr: unknown key; did you mean optim.lr?"),
        ("train.lr=1", "train.lr: unknown key; did you mean optim.lr?"),
        ("evl.every=1", "evl.every: unknown key; did you mean eval.every?"),
        ("optm.lr=1", "optm.lr: unknown key; did you mean optim.lr?"),
        ("model.seq_len=1", "model.seq_len: unknown key; did you mean data.seq_len?"),
        ("model.num_head=1", "model.num_head: unknown key; did you mean model.num_heads?"),
        ("model.hidden_size=1", "model.hidden_size: unknown key; did you mean model.d_model?"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean optim.lr?"),
        ("warmup_step=1", "warmup_step: unknown key; did you mean optim.warmup_steps?"),
        ("sead=1", "sead: unknown key; did you mean seed?"),
        ("log.zzz=1", "log.zzz: unknown key; the keys here are every, tensorboard, wandb, wandb_project"),
        ("seed.x=1", "seed.x: unknown key; seed is a value, not a section; did you mean seed?"),
        ("optim=3", "optim: a section, so its keys stand below it (lr,"),
        ("optim={lrr: 1}", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("optim.lr={a: 1}", "optim.lr: must be a number, not a section"),
        ("extends=a.yaml", "extends: cannot be overridden"),
        ("optim.lr=", "optim.lr: no value after '='; write optim.lr=null for none"),
        ("optim.lr=#1", "optim.lr: no value after '='"),
        ("optim.lr", "'optim.lr' is not an override: it has no '='; write key=value, such as optim.lr=3e-4"),
        ("=3", "'=3' is not an override: '' is not a key"),
        ("optim..lr=3", "'optim..lr=3' is not an override: 'optim..lr' is not a key"),
        ("data.path=@x", "data.path: not valid YAML: found character '@' that cannot start any token"),
        ("optim={lr: 1, lr: 2}", "optim.lr: given twice; keep one"),
        ("data.path=a\udcff", "data.path: the character '\\udcff' is not allowed in YAML"),
    ],
)
def test_a_bad_override_is_one_message_from_the_command_line(smallest: Path, override: str, message: str) -> None:
    assert str(the_problem(smallest, override)).startswith(f"command line: {message}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=-1", "-1 must be greater than 0"),
        ("optim.lr=.nan", "nan must be a finite number"),
        ("optim.lr=.inf", "inf must be a finite number"),
        ("optim.lr=fast", "fast must be a number"),
        ("optim.lr=null", "has no value; it must be a number"),
        ("optim.lr=true", "true must be a number"),
        ("optim.lr=[1, 2]", "[1, 2] must be a number"),
        ("optim.beta1=1", "1 must be less than 1"),
        ("optim.min_lr_ratio=1.5", "1.5 must be at most 1"),
        ("seed=-3", "-3 must be at least 0"),
        ("seed=9223372036854775808", "9223372036854775808 must be less than 9223372036854775808"),
        ("train.steps=2.5", "2.5 must be a whole number"),
        ("train.steps=1e300", "1.0e+300 must be a whole number"),
        ("train.steps=ten", "ten must be a whole number"),
        ("train.steps=true", "true must be a whole number"),
        ("model.bias=maybe", "maybe must be true or false"),
        ("model.bias=7", "7 must be true or false"),
        ("name=123", '123 must be text; write "123"'),
        ("name=a/b", "a/b must match the pattern ^[A-Za-z0-9][A-Za-z0-9._-]*$"),
        ("run_dir=false", 'false must be text; write "false"'),
        ("parallel.zero=4", "4 must be one of 0, 1, 2, 3"),
        ("parallel.zero=true", "true must be one of 0, 1, 2, 3"),
        ("optim.schedule=cosin", "cosin must be one of cosine, wsd, constant; did you mean cosine?"),
        ("log.wandb=false", "false must be one of off, offline, online"),
        ("precision=fp16", "fp16 needs loss scaling, which is not built yet; use bf16"),
        ("precision=bfloat16", "bfloat16 must be one of fp32, bf16; did you mean bf16?"),
    ],
)
def test_a_value_out_of_range_names_the_value_and_the_rule(smallest: Path, override: str, message: str) -> None:
    key = override.partition("=")[0]
    assert str(the_problem(smallest, override)).startswith(f"command line: {key}: {message}")


def test_a_typo_names_its_file_its_line_and_the_nearest_key(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", SMALLEST + "  lrr: 2\n")
    assert str(the_problem(path)) == f"{path}:15: optim.lrr: unknown key; did you mean optim.lr?"


def test_a_misspelt_section_is_one_problem(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", SMALLEST + "chekpoint:\n  every: 3\n  keep: 1\n")
    assert str(the_problem(path)) == f"{path}:15: chekpoint: unknown key; did you mean checkpoint?"


def test_a_dotted_key_in_a_file_says_how_to_nest_it(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", SMALLEST + "log.every: 3\n")
    message = "a dotted key works on the command line only; in a file write `every` below `log:`"
    assert str(the_problem(path)) == f"{path}:15: log.every: {message}"


def test_a_missing_key_points_at_its_section(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", SMALLEST.replace("  steps: 10\n", ""))
    assert str(the_problem(path)) == f"{path}:9: train.steps: required, and not given: Optimiser steps."


def test_a_missing_section_says_what_it_needs(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", SMALLEST.replace("data:\n  seq_len: 32\n", ""))
    assert str(the_problem(path)) == f"{path}: data: required section, and not given; it needs at least seq_len"


def test_a_base_is_blamed_for_its_own_mistake(tmp_path: Path, smallest: Path) -> None:
    write(tmp_path, "b.yaml", "log:\n  every: 0\n")
    path = write(tmp_path, "a.yaml", "extends: [smallest.yaml, b.yaml]\n")
    assert str(the_problem(path)) == f"{tmp_path / 'b.yaml'}:2: log.every: 0 must be at least 1"


def test_all_problems_are_reported_together_in_the_order_of_lines(tmp_path: Path) -> None:
    text = SMALLEST.replace("d_model: 16", "d_model: 18").replace("batch_size: 8", "batch_size: x").replace("lr: 1e-3", "lr: -1")
    path = write(tmp_path, "a.yaml", text.replace("seq_len: 32\ntrain", "seq_len: 64\ntrain") + "  lrr: 2\nseed: 1\nseed: 2\n")
    with pytest.raises(ConfigErrors) as caught:
        load_config(path, ["log.every=0", "sed=3", "novalue"])
    assert isinstance(caught.value, ConfigError) and caught.value.exit_code == ExitCode.USAGE
    lines = str(caught.value).splitlines()
    assert lines[0] == "the config has 9 problems"
    assert [line.split(": ", 2)[:2] for line in lines[1:]] == [
        [f"{path}:3", "model.d_model"],  # 18 is not divisible by 4: a rule across keys, reported beside the rest
        [f"{path}:8", "data.seq_len"],  # another one
        [f"{path}:11", "train.batch_size"],
        [f"{path}:14", "optim.lr"],
        [f"{path}:15", "optim.lrr"],
        [f"{path}:17", "seed"],
        ["command line", "sed"],
        ["command line", "'novalue' is not an override"],
        ["command line", "log.every"],
    ]


def test_one_problem_is_one_line(smallest: Path) -> None:
    with pytest.raises(ConfigErrors) as caught:
        load_config(smallest, ["optim.lr=0"])
    assert str(caught.value) == "command line: optim.lr: 0 must be greater than 0"


def test_every_synonym_leads_to_a_real_key_and_is_not_one() -> None:
    assert set(SYNONYMS.values()) <= set(KEYS)
    assert not {key.rpartition(".")[2] for key in KEYS} & set(SYNONYMS)


@given(key=st.sampled_from([key for key in KEYS if len(key.rpartition(".")[2]) >= 4]), data=st.data())
def test_a_key_with_one_letter_missing_is_found_again_in_its_section(key: str, data: st.DataObject) -> None:
    section, dot, name = key.rpartition(".")
    gap = data.draw(st.integers(0, len(name) - 1))
    wrong = section + dot + name[:gap] + name[gap + 1 :]
    near = nearest_key(wrong)
    assert near is not None
    if wrong.rpartition(".")[2] not in {known.rpartition(".")[2] for known in KEYS}:
        assert near.rpartition(".")[0] == section


@given(text=st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_text_survives_an_override(text: str) -> None:
    path = ROOT / "configs" / "tiny" / "gpt2.yaml"
    assert load_config(path, [f"data.path={scalar(text)}"]).config.data.path == text


@given(lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False), seed=st.integers(0, 2**63 - 1), bias=st.booleans())
def test_any_number_survives_an_override(lr: float, seed: int, bias: bool) -> None:
    overrides = [f"optim.lr={lr!r}", f"seed={seed}", f"model.bias={scalar(bias)}"]
    config = load_config(ROOT / "configs" / "tiny" / "gpt2.yaml", overrides).config
    assert (config.optim.lr, config.seed, config.model.bias) == (lr, seed, bias)


@given(override=st.text(st.characters(exclude_categories=()), max_size=40))
def test_no_override_ends_in_a_traceback(override: str) -> None:
    problems_of(ROOT / "configs" / "tiny" / "gpt2.yaml", override, f"optim.lr={override}", f"log={override}")
