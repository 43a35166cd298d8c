"""Optimiser state and parameters kept on the CPU give the numbers of those kept on the device, at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest

from dist_llm.config.load import ConfigErrors
from dist_llm.parallel.ranks import run_on_ranks
from dist_llm.verify.figures import Figures, compare
from tests.engine.layout_program import config_at, offloads

CPU_OPTIMIZER, CPU_PARAMETERS = "parallel.offload_optimizer=cpu", "parallel.offload_parameters=cpu"
# gpt2: biases, which ZeRO pads, learned positions and a tied embedding.
CONFIGS = {
    "zero1": ("gpt2", ["parallel.zero=1"]),
    "zero2": ("gpt2", ["parallel.zero=2"]),
    "zero3": ("gpt2", ["parallel.zero=3"]),
    "zero1 optimizer": ("gpt2", ["parallel.zero=1", CPU_OPTIMIZER]),
    "zero2 optimizer": ("gpt2", ["parallel.zero=2", CPU_OPTIMIZER]),
    "zero3 optimizer": ("gpt2", ["parallel.zero=3", CPU_OPTIMIZER]),
    "zero3 parameters": ("gpt2", ["parallel.zero=3", CPU_PARAMETERS]),
    "zero3 both": ("gpt2", ["parallel.zero=3", CPU_OPTIMIZER, CPU_PARAMETERS]),
    "zero2 bf16": ("gpt2", ["parallel.zero=2", "precision=bf16"]),
    "zero2 optimizer bf16": ("gpt2", ["parallel.zero=2", "precision=bf16", CPU_OPTIMIZER]),
}
RESUMED = ["zero2 optimizer", "zero3 both"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("offload")
    return run_on_ranks(offloads, dp=2, args=(str(root), CONFIGS, RESUMED), deadline_s=180)[0]


@pytest.mark.parametrize("name", [name for name in CONFIGS if "optimizer" in name or "parameters" in name or "both" in name])
def test_offload_to_cpu_changes_no_number(answers: dict[str, Any], name: str) -> None:
    base = name.replace(" optimizer", "").replace(" parameters", "").replace(" both", "")
    figures = {key: Figures.from_tensors(answers["figures"][key]) for key in (name, base)}
    # The norm is summed over the flat partition instead of parameter by parameter: another order of the same fp32 sums.
    difference = compare(figures[base], figures[name], tolerance=2e-6)
    print(f"{name}: {difference.largest:.1e}")
    assert difference.largest < 2e-6, difference


@pytest.mark.parametrize("name", RESUMED)
def test_an_offloaded_run_goes_on_from_its_checkpoint_with_the_same_digits(answers: dict[str, Any], name: str) -> None:
    whole, rest, without = answers["curves"][name]
    assert rest == whole[-len(rest) :] and len(rest) == len(whole) // 2
    # Without offload to rounding, and its checkpoint needs no conversion.
    assert max(abs(a - b) / b for (a, _), (b, _) in zip(without, rest, strict=True)) < 1e-6


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_parameters"])
def test_nvme_is_refused_before_anything_starts_with_what_it_needs_and_the_way_out(key: str) -> None:
    with pytest.raises(ConfigErrors) as refused:
        config_at("llama", ["parallel.zero=3", f"parallel.{key}=nvme"])
    said = str(refused.value)
    assert f"parallel.{key} nvme" in said and "libaio-dev" in said and f"use parallel.{key} cpu" in said


@pytest.mark.parametrize(
    ("words", "needs"),
    [(["parallel.zero=0", CPU_OPTIMIZER], "parallel.zero 1 or more"), (["parallel.zero=2", CPU_PARAMETERS], "parallel.zero 3")],
)
def test_offload_of_what_zero_does_not_divide_is_refused_with_the_stage_that_would(words: list[str], needs: str) -> None:
    with pytest.raises(ConfigErrors, match=needs):
        config_at("llama", words)
