"""The races of single kernels: what a race reports, and what it refuses."""

from __future__ import annotations

import importlib
import math
import os
import pkgutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.bench import kernels
from dist_llm.bench.answer import decode, encode
from dist_llm.bench.kernel_cases import KERNEL_CASES
from dist_llm.bench.kernels import rms_norm, run
from dist_llm.bench.kernels.case import Race, relative_errors
from dist_llm.bench.kernels.page import kernels_page
from dist_llm.bench.kernels.race import is_less_accurate, run_race
from dist_llm.bench.kernels.run import RaceFailed, case_as_text, run_case, run_in_process
from dist_llm.utils.errors import ConfigError, ExitCode

CPU = torch.device("cpu")


def scaled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight


def make_race(**changes: object) -> Race:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(64, 32, generator=generator), torch.randn(32, generator=generator)
    race = Race("a product", (x, weight), wanted=(0, 1), reference=scaled, ours=scaled, eager=scaled, moved_bytes=1 << 16)
    return replace(race, **{"why_not_compiled": "it is a test", **changes})  # type: ignore[arg-type]


def test_every_case_has_its_races_and_every_race_its_case() -> None:
    modules = {module.name for module in pkgutil.iter_modules(kernels.__path__)} - {"case", "page", "race", "run"}
    assert modules == set(KERNEL_CASES)


def test_a_race_reports_times_ratio_ceiling_and_errors() -> None:
    answer = run_race(make_race(), CPU, rounds=2)
    assert answer["ours_ms"] > 0 and answer["peers"].keys() == {"eager"} and answer["best_peer"] == "eager"
    assert answer["ratio"] == pytest.approx(answer["peers"]["eager"] / answer["ours_ms"])
    assert answer["pct_of_ceiling"] == pytest.approx(100 * answer["ceiling_ms"] / answer["ours_ms"])
    assert 0 < answer["err"] < 1e-6 and not is_less_accurate(answer)
    assert decode(encode(answer)) == answer
    page = kernels_page([{**answer, "races": [answer], "malloc": "tuned", "torch": torch.__version__}])
    assert "| a product |" in page and "torch.compile does not race: it is a test" in page and "medians of 2 interleaved rounds" in page


def test_times_only_leaves_out_errors_and_yardsticks() -> None:
    race = make_race(yardsticks={"beside": scaled}, definitions={"our reference": scaled})
    answer = run_race(race, CPU, rounds=1, times_only=True)
    assert answer["ratio"] > 0 and answer["err"] is None and answer["peer_err"] is None and answer["yardsticks"] == {}
    whole = {**answer, "case": "c", "races": [answer], "malloc": "tuned", "torch": torch.__version__, "ok": True}
    assert "| a product |" in kernels_page([whole]) and "error" not in case_as_text(whole)


def test_the_less_accurate_is_told_from_the_lucky() -> None:
    def rough(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * weight.bfloat16().float()

    errors = relative_errors(make_race(), {"ours": rough, "eager": scaled})
    assert errors["ours"].results > 1e-3 > 1e-6 > errors["eager"].results
    assert is_less_accurate({"err": errors["ours"].results, "peer_err": errors["eager"].results})
    assert not is_less_accurate({"err": 1.05e-3, "peer_err": 1e-3})
    assert is_less_accurate({"err": 1e-7, "peer_err": 1e-7, "copies_err": 1e-2, "copies_peer_err": 1e-3})


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
    assert torch.equal(race.results(double)[0][0], 2 * before)
    assert torch.equal(race.args[0], before)


def test_copies_that_are_rounded_do_not_hide_a_rough_update() -> None:
    def update(x: torch.Tensor, copies: list[torch.Tensor]) -> None:
        x.mul_(1.01)
        copies[0].copy_(x)

    def rough_update(x: torch.Tensor, copies: list[torch.Tensor]) -> None:
        update(x, copies)
        x.mul_(1 + 1e-4)

    x = make_race().args[0]
    race = make_race(
        args=(x, [x.bfloat16()]), wanted=(), changed=(0,), copies=(1,), reference=update, eager=update, ours=rough_update, moved_bytes=0
    )
    answer = run_race(race, CPU, rounds=1)
    assert answer["copies_err"] == answer["copies_peer_err"] > 1e-3 > answer["err"]  # one largest error over both would be equal
    assert is_less_accurate(answer)


@pytest.mark.parametrize("where", [0, -1])
def test_a_number_that_is_none_is_an_infinite_error_wherever_it_stands(where: int) -> None:
    def broken(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = x * weight
        y.view(-1).detach()[where] = math.nan
        return y

    assert relative_errors(make_race(), {"ours": broken})["ours"].results == math.inf
    race = make_race(reference=lambda *args: (scaled(*args), scaled(*args)), ours=lambda *args: (scaled(*args), broken(*args)), wanted=())
    assert relative_errors(race, {"ours": race.ours})["ours"].results == math.inf  # max() drops a NaN that is not the first
    answer = run_race(make_race(ours=broken), CPU, rounds=1)
    assert answer["err"] == math.inf and is_less_accurate(answer)
    assert decode(encode(answer)) == answer and '"err": "inf"' in encode(answer)
    assert is_less_accurate({"err": math.nan, "peer_err": 1e-3}) and is_less_accurate({"err": math.nan, "peer_err": None})


def test_a_peer_without_finite_results_is_not_the_best() -> None:
    answer = run_race(make_race(peers={"empty": lambda x, weight: x * weight * math.nan}), CPU, rounds=1)
    assert answer["errors"]["empty"] == math.inf and answer["best_peer"] == "eager" and math.isfinite(answer["peer_err"])


def test_a_result_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ours has \(64, 1\) as result 0, the reference \(64, 32\)"):
        relative_errors(make_race(wanted=()), {"ours": lambda x, weight: (x * weight)[:, :1]})


def test_a_goal_over_some_peers_stands_beside_the_ratio_over_all() -> None:
    def slow(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            y = x * weight
        return y

    race = make_race(eager=slow, peers={"quick": scaled}, goal=10.0, goal_against=("eager",), wanted=())
    answer = run_race(race, CPU, rounds=3)
    assert (
        answer["best_peer"] == "quick" and answer["ratio"] == answer["ratios"]["quick"] < answer["goal_ratio"] == answer["ratios"]["eager"]
    )
    whole = {**answer, "case": "c", "races": [answer], "malloc": "tuned", "torch": torch.__version__, "ok": True}
    assert f"10 over eager: {answer['goal_ratio']:.2f}" in kernels_page([whole])
    assert f"({answer['ratios']['quick']:.2f})" in kernels_page([whole]) and f"{answer['goal_ratio']:.2f} reached" in case_as_text(whole)
    assert run_race(race, CPU, rounds=1, only=["quick"])["goal_ratio"] is None


def test_over_our_own_definition_no_ratio_is_claimed_but_accuracy_is_checked() -> None:
    def rough(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * weight.bfloat16().float()

    answer = run_race(make_race(eager=None, ours=rough, definitions={"our reference": scaled}), CPU, rounds=1)
    assert answer["ratio"] is None and answer["best_peer"] is None and answer["peers"] == {}
    assert "our reference" in answer["yardsticks"] and is_less_accurate(answer)


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_everyone_in_a_case_computes_the_same(name: str) -> None:
    for race in importlib.import_module(f"dist_llm.bench.kernels.{name}").races(CPU, tiny=True):
        others = {who: fn for who, fn in {**race.all_peers(), **race.definitions}.items() if "compile" not in who}  # half a minute each
        errors = relative_errors(race, {"ours": race.ours, **others})
        assert max(error.results for error in errors.values()) < 0.02, (race.title, errors)
        assert set(race.goal_against) <= set(race.all_peers())
        for fn in (race.ours, *others.values(), *race.yardsticks.values()):
            race.call(fn)()


def plant(monkeypatch: pytest.MonkeyPatch, *races: Race) -> None:
    """Have ``bench rms_norm`` run these."""
    monkeypatch.setattr(rms_norm, "races", lambda device: list(races))


def test_a_peer_may_be_in_any_race_of_the_case_and_an_unknown_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, make_race(), make_race(peers={"other": scaled}))
    first, second = run_case("rms_norm", CPU, threads=None, rounds=1, malloc="default", only=["other"])["races"]
    assert first["peers"] == {} and first["ratio"] is None and second["peers"].keys() == {"other"}
    with pytest.raises(ConfigError, match="--peer eagr: rms_norm is raced against eager, other"):
        run_case("rms_norm", CPU, threads=None, rounds=1, malloc="default", only=["eagr"])


@pytest.mark.parametrize("set_by_user", [None, "1"])
def test_the_untuned_process_does_not_inherit_what_tuning_sets(monkeypatch: pytest.MonkeyPatch, set_by_user: str | None) -> None:
    seen: dict[str, Any] = {}
    name = "THP_MEM_ALLOC_ENABLE"
    monkeypatch.setenv(name, "before the test")  # so that it is restored
    if set_by_user is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, set_by_user)
    plant(monkeypatch, make_race())
    monkeypatch.setattr(run, "tune_allocator", lambda: os.environ.setdefault(name, "1"))
    monkeypatch.setattr(run, "run_in_process", lambda *args, **options: seen.update(options) or {})
    run_case("rms_norm", CPU, threads=None, rounds=5, malloc="both")
    assert os.environ[name] == "1" and seen["env"].get(name) == set_by_user
    assert seen["malloc"] == "default" and seen["rounds"] == 3 and seen["times_only"]


def stand_in(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_race_that_crashes_in_its_process_is_an_internal_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path / "crashing", "echo torn apart >&2; exit 139"))
    with pytest.raises(RaceFailed, match=r"bench rms_norm .* ended with status 139 and no answer: torn apart") as caught:
        run_in_process("rms_norm", CPU, threads=1, rounds=1, malloc="default")
    assert caught.value.exit_code == ExitCode.INTERNAL


def test_progress_of_a_race_in_its_process_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = """echo 'bench: rms_norm: one of two' >&2; echo 'a warning' >&2; echo '{"err": "inf", "words": "'"$*"'"}'"""
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path / "talking", script))
    said: list[str] = []
    answer = run_in_process("rms_norm", CPU, threads=1, rounds=None, malloc="both", only=["eager"], say=said.append)
    assert said == ["rms_norm: one of two"] and answer["err"] == math.inf
    assert answer["words"] == "-m dist_llm bench rms_norm --json --malloc both --device cpu --threads 1 --peer eager"
