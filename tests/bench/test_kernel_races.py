"""The races of single kernels: what a race reports, and what it refuses."""

from __future__ import annotations

import json
import pkgutil
from dataclasses import replace

import pytest
import torch

from dist_llm.bench import kernels
from dist_llm.bench.kernel_cases import KERNEL_CASES
from dist_llm.bench.kernels.case import Race, relative_errors
from dist_llm.bench.kernels.page import kernels_page
from dist_llm.bench.kernels.race import is_less_accurate, run_race
from dist_llm.utils.errors import ConfigError
from tests.conftest import Run

CPU = torch.device("cpu")


def scaled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight


def make_race(**changes: object) -> Race:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(64, 32, generator=generator), torch.randn(32, generator=generator)
    race = Race("a product", (x, weight), wanted=(0, 1), reference=scaled, ours=scaled, eager=scaled, compiles=False, moved_bytes=1 << 16)
    return replace(race, **changes)  # type: ignore[arg-type]


def test_every_case_has_its_races_and_every_race_its_case() -> None:
    modules = {module.name for module in pkgutil.iter_modules(kernels.__path__)} - {"case", "page", "race", "run"}
    assert modules == set(KERNEL_CASES)


def test_a_race_reports_times_ratio_ceiling_and_errors() -> None:
    answer = run_race(make_race(), CPU, rounds=2)
    assert answer["ours_ms"] > 0 and answer["peers"].keys() == {"eager"} and answer["best_peer"] == "eager"
    assert answer["ratio"] == pytest.approx(answer["peers"]["eager"] / answer["ours_ms"])
    assert answer["pct_of_ceiling"] == pytest.approx(100 * answer["ceiling_ms"] / answer["ours_ms"])
    assert 0 < answer["err"] < 1e-6 and not is_less_accurate(answer)
    assert json.loads(json.dumps(answer)) == answer
    assert "| a product |" in kernels_page([{**answer, "races": [answer], "malloc": "tuned", "torch": torch.__version__}])


def test_the_less_accurate_is_told_from_the_lucky() -> None:
    def rough(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * weight.bfloat16().float()

    errors = relative_errors(make_race(), {"ours": rough, "eager": scaled})
    assert errors["ours"] > 1e-3 > 1e-6 > errors["eager"]
    assert is_less_accurate({"err": errors["ours"], "peer_err": errors["eager"]})
    assert not is_less_accurate({"err": 1.05e-3, "peer_err": 1e-3})


def test_a_contestant_with_fewer_results_is_refused() -> None:
    def forgetful(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * weight.detach()

    with pytest.raises(ValueError, match="a product: ours has 2 results, the reference 3"):
        relative_errors(make_race(), {"ours": forgetful})


def test_tensors_that_a_call_changes_are_results_and_stay_as_they_were() -> None:
    def double(x: torch.Tensor, weight: torch.Tensor) -> None:
        x.mul_(2)

    race = make_race(reference=double, wanted=(), changed=(0,))
    before = race.args[0].clone()
    assert torch.equal(race.results(double)[0], 2 * before)
    assert torch.equal(race.args[0], before)


def test_an_unknown_peer_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="--peer eagr: this race has eager"):
        run_race(make_race(), CPU, rounds=1, only=["eagr"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "bench needs a CASE"),
        (["--all", "rms_norm"], "leave rms_norm out"),
        (["--threads", "1", "rms_norm"], "--threads belongs behind the case"),
        (["rms_norm", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--all", "--out", "no/such/place.md"], "the directory no/such is not there"),
    ],
)
def test_bad_arguments_get_one_message_and_status_2(dist_llm: Run, words: list[str], message: str) -> None:
    done = dist_llm("bench", *words)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
