"""Fitting scaling laws: known laws come back, with honest intervals; bad tables are refused by line."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_llm.cli import plan_fit
from dist_llm.planning.approaches import envelope, isoflop, with_noise
from dist_llm.planning.fit import fit_law, fit_quality, minimise
from dist_llm.planning.law_forms import FORMS, Points
from dist_llm.planning.laws import HOFFMANN, KAPLAN
from dist_llm.planning.points import read_points
from dist_llm.planning.robust import huber, objective
from dist_llm.utils.errors import ConfigError, DataError, ExitCode, UserError

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def grid(sizes: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(sizes, tokens)
    return n.ravel(), d.ravel()


def chinchilla(n: np.ndarray, d: np.ndarray, noise: float = 0.0, seed: int = 0) -> Points:
    loss = HOFFMANN.E + HOFFMANN.A / n**HOFFMANN.alpha + HOFFMANN.B / d**HOFFMANN.beta
    return Points(n, d, loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n))), n)


def large_ladder(noise: float = 0.0, seed: int = 0) -> Points:
    """6 sizes x 6 lengths, of the sizes of the paper."""
    return chinchilla(*grid(np.geomspace(5e7, 1.6e10, 6), np.geomspace(1e9, 3e11, 6)), noise, seed)


def small_ladder(noise: float = 0.0, seed: int = 0) -> Points:
    """6 sizes x 3 lengths a parameter, of the sizes a laptop trains: E is far below every loss, and hardly to be seen."""
    n, ratio = grid(np.geomspace(1e5, 1e6, 6), np.geomspace(5, 80, 3))
    return chinchilla(n, n * ratio, noise, seed)


def missed(points: Points, samples: int, law: str = "chinchilla") -> list[str]:
    interval = fit_law(points, law, samples=samples).interval
    return [name for name, value in TRUTH.items() if not interval[name][0] <= value <= interval[name][1]]


def test_a_law_without_noise_comes_back_to_six_digits() -> None:
    for points in (large_ladder(), small_ladder()):
        fit = fit_law(points, samples=100)
        for name, value in TRUTH.items():
            assert fit.coefficients[name] == pytest.approx(value, rel=1e-6)
            assert fit.interval[name][0] <= value <= fit.interval[name][1]
        assert fit.rms < 1e-8
        assert np.abs(fit.left_out).max() < 1e-6
        assert not fit.open_sides


@pytest.mark.parametrize("seed", range(3))
def test_noisy_coefficients_lie_in_their_intervals(seed: int) -> None:
    assert missed(large_ladder(0.01, seed), 300) == []
    assert missed(small_ladder(0.005, seed), 300) == []


@pytest.mark.slow
@pytest.mark.parametrize(("ladder", "noise"), [(small_ladder, 0.005), (large_ladder, 0.01)])
def test_all_coefficients_lie_in_their_intervals_together_in_95_of_100_ladders(ladder, noise: float) -> None:
    failures = [missed(ladder(noise, seed), 1000) for seed in range(100)]
    print({name: 100 - sum(name in f for f in failures) for name in TRUTH}, "together", sum(not f for f in failures))
    assert sum(not f for f in failures) >= 95


def test_intervals_are_not_so_wide_as_to_say_nothing() -> None:
    interval = fit_law(large_ladder(0.005), samples=300).interval
    assert interval["alpha"][1] - interval["alpha"][0] < 0.1
    assert interval["beta"][1] - interval["beta"][0] < 0.1
    assert 1.5 < interval["E"][0] < interval["E"][1] < 1.85


def test_an_interval_says_where_the_runs_do_not() -> None:
    fit = fit_law(small_ladder(0.02), samples=300)
    assert "E low" in fit.open_sides
    assert fit.interval["E"][0] == 0.0


def test_one_wild_run_moves_nothing_far() -> None:
    points = large_ladder(0.001)
    loss = points.loss.copy()
    loss[17] *= 1.3
    fit = fit_law(Points(points.params, points.tokens, loss, points.active), samples=100)
    for name in ("E", "alpha", "beta"):
        assert fit.coefficients[name] == pytest.approx(TRUTH[name], rel=0.02)
    assert np.abs(fit.left_out).argmax() == 17


def test_the_fit_is_the_lowest_of_many_searches() -> None:
    points = small_ladder(0.01, seed=5)
    form = FORMS["chinchilla"](points)
    inputs, log_loss = form.inputs(points.params, points.tokens, points.active), np.log(points.loss)
    best = float(objective(form, minimise(form, inputs, log_loss)[None], inputs, log_loss)[0])
    from scipy.optimize import differential_evolution

    low, high = [0.0, -3.0, -3.0, 0.0, 0.0], [4.0, 3.0, 3.0, 1.0, 1.0]
    other = differential_evolution(
        lambda t: float(objective(form, t[None], inputs, log_loss)[0]), list(zip(low, high, strict=True)), seed=0, maxiter=300, popsize=12
    )
    assert best <= other.fun * (1 + 1e-6)


@pytest.mark.parametrize("law", FORMS)
def test_derivatives_are_those_of_differences(law: str) -> None:
    rng = np.random.default_rng(1)
    n, d = grid(np.geomspace(1e6, 1e9, 4), np.geomspace(1e8, 1e10, 3))
    total = n * rng.integers(1, 8, len(n))
    form = FORMS[law](Points(total, d, np.full(len(n), 3.0), n))
    inputs = form.inputs(total, d, n)
    theta = {"kaplan": [0.08, 0.1, 12.0, 9.0]}.get(law, [1.7, 0.1, -0.2, 0.34, 0.28, 0.4][: len(form.names)])
    at = np.array([theta])
    _, jacobian = form.predict(at, inputs)
    for i in range(len(form.names)):
        step = np.zeros_like(at)
        step[0, i] = 1e-6
        difference = (form.predict(at + step, inputs)[0] - form.predict(at - step, inputs)[0]) / 2e-6
        # Central differences of step 1e-6 are right to about 1e-9.
        np.testing.assert_allclose(jacobian[0, :, i], difference[0], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(form.inner(form.outer(at)), at, rtol=1e-12)


def test_huber_is_quadratic_within_its_width_and_linear_beyond() -> None:
    np.testing.assert_allclose(huber(np.array([0.0, 5e-4, 1e-3, -2e-3, 1.0])), [0.0, 1.25e-4, 5e-4, 1.5e-3, 0.9995])


def test_kaplans_law_comes_back() -> None:
    n, d = grid(np.geomspace(1e7, 1e10, 5), np.geomspace(1e9, 1e11, 5))
    loss = np.array([KAPLAN.loss(a, b) for a, b in zip(n, d, strict=True)])
    fit = fit_law(Points(n, d, loss, n), "kaplan", samples=100)
    for name in ("alpha_N", "alpha_D"):
        assert fit.coefficients[name] == pytest.approx(getattr(KAPLAN, name), rel=1e-5)
    for name in ("N_c", "D_c"):
        assert fit.coefficients[name] == pytest.approx(getattr(KAPLAN, name), rel=1e-3)
    assert fit_quality(Points(n, d, loss, n), "chinchilla")["rms_log_loss"] > 100 * fit.rms


def test_experts_are_counted_by_the_share_that_made_them() -> None:
    active, d = grid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e11, 4))
    total = active * np.resize([1.0, 2.0, 4.0, 8.0, 1.0], len(active))
    effective = active * (total / active) ** 0.4
    loss = chinchilla(effective, d, 0.002).loss
    fit = fit_law(Points(total, d, loss, active), "moe", samples=200)
    low, high = fit.interval["share"]
    assert low <= 0.4 <= high and high - low < 0.2
    assert fit.effective_params(1e9, 8e9) == pytest.approx(1e9 * 8 ** fit.coefficients["share"])


def test_the_law_for_experts_needs_experts() -> None:
    with pytest.raises(ConfigError, match="same total to active parameters"):
        fit_law(large_ladder(), "moe", samples=100)


def test_three_approaches_agree_on_a_known_law() -> None:
    exponent = HOFFMANN.beta / (HOFFMANN.alpha + HOFFMANN.beta)
    points = chinchilla(*grid(np.geomspace(5e7, 1.6e10, 16), np.geomspace(1e9, 5e11, 15)))
    curves, slices = envelope(points), isoflop(points)
    assert not isinstance(curves, str) and not isinstance(slices, str)
    # Sizes are steps in approach 1, and loss between run lengths is interpolated in both.
    assert curves.law.exponent == pytest.approx(exponent, abs=0.02)
    assert slices.law.exponent == pytest.approx(exponent, abs=0.02)
    for flops in (1e20, 1e21):
        assert slices.law.params(flops) == pytest.approx(HOFFMANN.optimal(flops).params, rel=0.1)


def test_isoflop_runs_give_their_bottoms() -> None:
    n, c = grid(np.geomspace(3e6, 1e8, 8), np.geomspace(1e16, 1e18, 4))
    points = chinchilla(n, c / (6 * n))
    found = with_noise(isoflop, points, 0.001)
    assert not isinstance(found, str)
    assert len(found.flops) == 4
    for flops, params in zip(found.flops, found.params, strict=True):
        # A parabola through five sizes a factor 1.65 apart; the valley is a little lopsided.
        assert params == pytest.approx(HOFFMANN.optimal(float(flops)).params, rel=0.1)
    assert found.exponent_interval is not None
    assert found.exponent_interval[0] < 0.4516 < found.exponent_interval[1]


def test_an_approach_without_a_valley_says_why() -> None:
    n, ratio = grid(np.geomspace(1e7, 1e9, 4), np.array([5.0, 6.0]))
    assert "add sizes or token counts" in str(envelope(chinchilla(n, n * ratio)))
    assert "2 are needed" in str(isoflop(chinchilla(n, n * ratio)))


def test_the_optimum_comes_with_its_uncertainty() -> None:
    found = fit_law(large_ladder(0.005, 2), samples=300).optimal(1e23)
    exact = HOFFMANN.optimal(1e23)
    assert found.params[0] <= exact.params <= found.params[1]
    assert found.tokens[0] <= exact.tokens <= found.tokens[1]
    assert found.loss[0] <= exact.loss <= found.loss[1]


def test_the_next_run_narrows_the_prediction_when_it_is_made() -> None:
    points = small_ladder(0.005, 1)
    fit = fit_law(points, samples=500)
    target = 10 * float(points.flops.max())
    advice = fit.next_run(target, 3 * float(points.flops.max()))
    assert advice.flops <= 3 * points.flops.max() * 1.001
    assert advice.error_then < advice.error_now
    extra = chinchilla(np.array([advice.params]), np.array([advice.tokens]))
    more = Points(*(np.append(getattr(points, k), getattr(extra, k)) for k in ("params", "tokens", "loss", "active")))
    now, then = (f.optimal(target).loss for f in (fit, fit_law(more, samples=500)))
    assert then[1] - then[0] < now[1] - now[0]


def test_too_few_points_are_refused_with_how_many_would_do() -> None:
    points = large_ladder()
    with pytest.raises(ConfigError, match="5 points are too few for the chinchilla law: it has 5 coefficients, so 6 points"):
        fit_law(points.take(slice(0, 5)))
    with pytest.raises(ConfigError, match=r"only 2 different value\(s\) of tokens"):
        fit_law(points.take(points.tokens < 5e9))


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("params,tokens\n1,2\n", ConfigError, "line 1: there is no column 'loss' among params, tokens"),
        ("params,token,loss\n1,2,3\n", ConfigError, "no column 'tokens' among params, token, loss; is it called 'token' here"),
        ("params,tokens,loss\n1e6,1e8,3\n1e6,-5,3\n", DataError, "line 3: tokens is -5; it must be a positive number"),
        ("params,tokens,loss\n1e6,1e8,0\n", DataError, "line 2: loss is 0"),
        ("# made by hand\n\nparams,tokens,loss\n1e6,1e8,nan\n", DataError, "line 4: loss is nan"),
        ("params,tokens,loss\n1e6,many,3\n", DataError, "line 2: tokens is 'many', not a number"),
        ("params,tokens,loss\n1e6,1e8\n", DataError, "line 2: 2 values, but the header names 3 columns"),
        ("params,tokens,loss,active\n1e6,1e8,3,2e6\n", DataError, "line 2: active is 2e"),
        ("params,tokens,loss\n", ConfigError, "has a header and no runs"),
        ("", ConfigError, "is empty; it needs a header with params, tokens, loss"),
        ("params,tokens,loss,loss\n1,2,3,4\n", ConfigError, "the column 'loss' stands there twice"),
    ],
)
def test_a_bad_table_is_refused_by_line(tmp_path: Path, text: str, kind: type[UserError], message: str) -> None:
    path = table(tmp_path / "runs.csv", text)
    with pytest.raises(kind, match=message) as caught:
        read_points(path)
    assert str(path) in str(caught.value)


def test_other_columns_and_spaces_do_no_harm(tmp_path: Path) -> None:
    points = read_points(table(tmp_path / "runs.csv", "name, params ,loss,tokens\nfirst,1e6, 3.5 ,100000000\n"))
    assert (points.params[0], points.tokens[0], points.loss[0], points.active[0]) == (1e6, 1e8, 3.5, 1e6)


def fit_command(*words: object) -> int:
    parser = argparse.ArgumentParser()
    plan_fit.add_arguments(parser)
    return plan_fit.run(parser.parse_args([str(w) for w in words]))


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    points = large_ladder(0.005, 3)
    rows = "".join(f"{n},{d},{loss}\n" for n, d, loss in zip(points.params, points.tokens, points.loss, strict=True))
    return table(tmp_path_factory.mktemp("fit") / "runs.csv", "params,tokens,loss\n" + rows)


def test_json_has_the_promised_keys(csv_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        fit_command(csv_file, "--json", "--samples", 200, "--flops", "1e22", "1e24", "--hold-out", 1, "--unique-tokens", "1e11")
        == ExitCode.DONE
    )
    answer = json.loads(capsys.readouterr().out)
    for name, value in TRUTH.items():
        assert answer["interval"][name][0] <= value <= answer["interval"][name][1]
        assert answer["interval"][name][0] <= answer[name] <= answer["interval"][name][1]
    assert [row["flops"] for row in answer["optimal"]] == [1e22, 1e24]
    assert answer["points"] == 30 and len(answer["held_out"]) == 6
    # The largest size, five times any in the fit, is predicted within three times the noise.
    assert all(abs(row["rel_err"]) < 0.015 for row in answer["held_out"])
    assert {"leave_one_out", "approaches", "next_run", "beside", "interval_level"} <= answer.keys()
    assert answer["data_constrained"][1]["passes"] > 1
    assert answer["beside"]["kaplan"]["rms_log_loss"] > answer["rms_log_loss"]


def test_the_text_names_the_coefficients_and_the_figure_is_drawn(
    csv_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "fit.png"
    assert fit_command(csv_file, "--samples", 100, "--plot", picture, "--hold-out", 1) == ExitCode.DONE
    text = capsys.readouterr().out
    for word in ("alpha", "left out of the fit", "kaplan's law beside", "minimum over curves", "isoflop", "next run", "held out: 1.6e+10"):
        assert word in text
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--plot", "fit.jpeg"), "must end in .png, .svg or .pdf"),
        (("--hold-out", "9"), "leaves none of 6 sizes"),
        (("--flops", "-1"), "must be a positive number"),
        (("--samples", "10"), "must be at least 100"),
        (("--law", "kaplan", "--unique-tokens", "1e9"), "needs Chinchilla's law"),
    ],
)
def test_options_that_cannot_be_are_refused(csv_file: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_command(csv_file, *words)


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.csv does not exist"):
        fit_command(tmp_path / "nowhere.csv")
    with pytest.raises(ConfigError, match="holds no runs"):
        fit_command(tmp_path)


def test_help_loads_neither_numpy_nor_scipy() -> None:
    code = (
        "import sys, argparse, dist_llm.cli.plan_fit as f, dist_llm.cli.plan_ladder as l; f.add_arguments(argparse.ArgumentParser()); "
        "l.add_arguments(argparse.ArgumentParser()); print([m for m in ('numpy', 'scipy', 'matplotlib', 'torch', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_planning_never_loads_torch() -> None:
    modules = ("fit", "intervals", "laws", "approaches", "ladder", "law_plots", "mup", "experts", "repetition", "count_shapes", "points")
    code = "import sys; " + "; ".join(f"import dist_llm.planning.{m}" for m in modules) + "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
