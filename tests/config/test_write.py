from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.config.keys import KEYS, values_by_key
from dist_llm.config.load import config_hash, diff_configs, dump_yaml, load_config
from dist_llm.config.schema import RunConfig
from dist_llm.config.syntax import parse
from dist_llm.config.write import scalar

from .configs import GPT2, LLAMA, TINY, write


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
@pytest.mark.parametrize("with_origins", [False, True])
def test_what_is_written_loads_as_the_same_config(tmp_path: Path, path: Path, with_origins: bool) -> None:
    resolved = load_config(path, ["optim.lr=1e-5", "run_dir=' a # b: \u2028 \U0001f600 '", "log.wandb_project=off"])
    text = dump_yaml(resolved.config, resolved.origins if with_origins else None)
    again = load_config(write(tmp_path, "again.yaml", text))
    assert again.config == resolved.config
    assert "default" not in again.origins.values()
    assert ("# command line" in text) is with_origins


def test_any_yaml_1_1_loader_reads_the_same_config() -> None:
    config = load_config(GPT2, ["optim.lr=1e-5", "name=1e5x", "log.wandb_project=off"]).config
    assert RunConfig.model_validate(yaml.safe_load(dump_yaml(config))) == config
    assert yaml.safe_load(dump_yaml(config))["optim"]["lr"] == 1e-5


def test_each_value_carries_its_origin() -> None:
    resolved = load_config(LLAMA, ["train.steps=7"])
    lines = {line.split(":")[0].strip(): line for line in dump_yaml(resolved.config, resolved.origins).splitlines()}
    assert lines["steps"].endswith("# command line")
    assert lines["engine"].endswith("# default")
    assert lines["rope_theta"].endswith(f"# {LLAMA}:{resolved.origins['model.rope_theta'].rpartition(':')[2]}")


def test_a_line_break_in_a_file_name_does_not_end_the_comment(tmp_path: Path) -> None:
    path = write(tmp_path, "a\nseed: 5.yaml", GPT2.read_text(encoding="utf-8"))
    resolved = load_config(path)
    again = load_config(write(tmp_path, "again.yaml", dump_yaml(resolved.config, resolved.origins)))
    assert again.config == resolved.config


scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(value=scalars | st.lists(scalars))
def test_a_written_value_is_read_back_by_both_loaders(value: object) -> None:
    problems: list[object] = []
    text = f"k: {scalar(value)}  # note\n"
    entry = parse(text, "x.yaml", problems)  # type: ignore[arg-type]
    assert entry is not None and not problems
    for read in (entry.value["k"].value, yaml.safe_load(text)["k"]):
        assert read == value and type(read) is type(value)


def test_origins_name_every_key_once() -> None:
    resolved = load_config(GPT2)
    assert list(resolved.origins) == list(KEYS) == list(values_by_key(resolved.config))


def test_the_hash_depends_on_the_values_alone(tmp_path: Path) -> None:
    resolved = load_config(GPT2)
    again = load_config(write(tmp_path, "again.yaml", dump_yaml(resolved.config)))
    assert config_hash(again.config) == config_hash(resolved.config)
    assert config_hash(load_config(GPT2, ["log.every=6"]).config) != config_hash(resolved.config)
    assert len(config_hash(resolved.config)) == 64


def test_the_difference_names_each_key_with_both_values() -> None:
    a, b = load_config(GPT2).config, load_config(GPT2, ["optim.lr=2e-3", "name=other", "model.bias=true"]).config
    assert diff_configs(a, a) == []
    assert diff_configs(a, b) == [("name", "tiny-gpt2", "other"), ("optim.lr", 1e-3, 2e-3)]
