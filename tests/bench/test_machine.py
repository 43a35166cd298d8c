from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_llm.bench.machine import machine_as_text, measure_machine
from dist_llm.bench.machine_file import write_machine
from dist_llm.bench.machine_fit import fit_machine, link_seconds
from dist_llm.cli.main import main
from dist_llm.engine.ranks import Launch
from dist_llm.planning.amounts import parse_fleet
from dist_llm.planning.cluster import Cluster, load_cluster
from dist_llm.planning.roofline import MEMORY_FRACTION, attention_seconds, gemm_seconds
from dist_llm.utils.errors import ConfigError, ExitCode

RANKS = 2
# Of a device that is nobody's: its times are made with the planner's formulas, so the fit has to find it again.
TRUTH = replace(
    load_cluster("cpu"), peaks=(("fp32", 80e9), ("bf16", 300e9)), matmul_fraction=1.0, memory_bandwidth=20e9, nvlink_bandwidth=1.7e9,
    nvlink_latency=30e-6, link_efficiency=1.0, launch=3e-6, attention_forward=0.4, attention_backward=0.25,
)  # fmt: skip


def times_of(cluster: Cluster) -> dict[str, Any]:
    def gemm(precision: str, m: int, n: int, k: int) -> dict[str, Any]:
        return {"precision": precision, "m": m, "n": n, "k": k, "s": gemm_seconds(m, n, k, cluster, precision)}

    def attention(backward: bool) -> float:
        return attention_seconds(1, 1024, 4, 64, cluster, kernel=1.0, backward=backward)

    links = [
        {"collective": c, "bytes": b} for b in (1 << 12, 1 << 18, 1 << 24) for c in ("all_reduce", "all_gather", "reduce_scatter", "send")
    ]
    return {
        "launch_s": cluster.launch,
        "gemm": [gemm(p, m, n, k) for p in ("fp32", "bf16") for m, n, k in ((1024, 512, 512), (2048, 1024, 512), (1024, 1024, 1024))],
        "copy": [{"bytes": 1 << 28, "s": (1 << 28) / (cluster.memory_bandwidth * MEMORY_FRACTION)}],
        "attention": {
            "rows": 1, "tokens": 1024, "heads": 4, "head_dim": 64, "implementation": "native",
            "forward_s": attention(False), "backward_s": attention(True) - cluster.launch,
        },
        "links": [{**point, "s": link_seconds(point, RANKS, cluster)} for point in links],
        "threads": 1,
    }  # fmt: skip


def fit(measured: dict[str, Any], ranks: int = RANKS) -> tuple[dict[str, Any], dict[str, float]]:
    return fit_machine(
        copy.deepcopy(measured), ranks=ranks, device="made up", generation="cpu", multiprocessors=TRUTH.multiprocessors, memory_bytes=8e9
    )


def test_a_machine_that_follows_the_planners_formulas_is_found_again() -> None:
    values, factors = fit(times_of(TRUTH))
    # Three digits are written; the simplex stops at 1e-4 of a logarithm.
    assert values["peak_tflops"] == pytest.approx({"fp32": 0.08, "bf16": 0.3}, rel=6e-3)
    assert values["memory_gb_per_s"] == pytest.approx(20, rel=6e-3)
    assert values["nvlink_gb_per_s"] == pytest.approx(1.7, rel=1e-2)
    assert values["nvlink_latency_us"] == pytest.approx(30, rel=1e-2)
    # A launch of 3 us is taken off the backward, of which the difference of two timings has none left: 3 us of 4 ms.
    assert values["attention"] == pytest.approx({"forward": 0.4, "backward": 0.25}, rel=6e-3)
    assert all(factor == pytest.approx(1, abs=5e-3) for factor in factors.values())


def test_one_outlier_among_the_products_does_not_move_the_rate() -> None:
    measured = times_of(TRUTH)
    measured["gemm"][0]["s"] *= 10
    values, factors = fit(measured)
    assert values["peak_tflops"]["fp32"] == pytest.approx(0.08, rel=6e-3)
    assert factors["products"] == pytest.approx(10 ** (1 / 6), rel=1e-2)  # it shows here: one of six is ten times off


def test_links_of_one_rank_are_those_of_the_template() -> None:
    values, factors = fit({**times_of(TRUTH), "links": []}, ranks=1)
    template = load_cluster("cpu")
    assert values["nvlink_gb_per_s"] == template.nvlink_bandwidth / 1e9 and values["gpus_per_node"] == 1
    assert set(factors) == {"products"}


def test_a_real_measurement_becomes_a_file_that_the_planner_takes(tmp_path: Path) -> None:
    answer = measure_machine(Launch("none"), ranks=2, seconds=0.002, tiny=True)
    path = tmp_path / "mine.yaml"
    write_machine(path, answer)
    cluster = load_cluster(str(path))
    assert cluster.gpus_per_node == 2 and cluster.peak("bf16") > 0 and cluster.memory_bytes > 1e8
    assert parse_fleet(f"2x{path}").cluster == cluster
    # What was measured, when and on what stands in the file, and no other line is free text.
    text = path.read_text(encoding="utf-8")
    assert answer["when"] in text.splitlines()[0] and answer["torch"] in text
    assert {p["collective"] for p in answer["measured"]["links"]} == {"all_reduce", "all_gather", "reduce_scatter", "send"}
    assert all(f"# {name}, us" in text for name in ("all_reduce", "all_gather", "reduce_scatter", "send"))
    assert all(point["s"] > 0 for curve in ("gemm", "copy", "links") for point in answer["measured"][curve])
    assert json.loads(json.dumps(answer)) == answer
    assert "collectives (gloo)" in machine_as_text(answer)


def test_measuring_again_replaces_what_was_read_before(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for memory in (8e9, 16e9):
        measured = times_of(TRUTH)
        values, factors = fit_machine(measured, ranks=2, device="made up", generation="cpu", multiprocessors=1, memory_bytes=memory)
        answer = {"device": "made up", "ranks": 2, "when": "now", "torch": "2", "backend": "gloo", "measured": measured}
        write_machine(path, {**answer, "cluster": values, "fit": factors})
        assert load_cluster(str(path)).memory_bytes == memory


def test_more_ranks_than_cores_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--ranks 4096: this machine has \d+ cores"):
        measure_machine(Launch("none"), ranks=4096, seconds=0.01, tiny=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "--ranks 0 must be at least 1"),
        (["--seconds", "0"], "--seconds 0.0 must be above 0"),
        (["--out", "machine"], "--out machine must end in .yaml"),
        (["--out", "nowhere/machine.yaml"], "lie in a directory that exists"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "machine", *words]) == ExitCode.USAGE
    assert message in capsys.readouterr().err
