"""plan.json of a real run: written before its first step, and no reason to stop it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dist_llm.config.schema import RunConfig
from dist_llm.planning.cluster import load_cluster
from dist_llm.planning.forecast import cluster_of_gpu, forecast_memory, forecast_time, forecast_traffic, measured_cluster
from dist_llm.planning.memory import rank_memory
from dist_llm.planning.roofline import gemm_seconds
from dist_llm.report.html import write_report
from dist_llm.topology.grid import RankGrid
from dist_llm.utils.errors import ConfigError
from tests.conftest import Run
from tests.engine.layout_program import config_at
from tests.engine.processes import records

LLAMA = "configs/tiny/llama.yaml"
WIDE = ("train.batch_size=64", "train.micro_batch_size=64")  # a micro-batch long enough for a forecast of its time


def _tiny(*words: str) -> RunConfig:
    return config_at("llama", list(words))


def test_a_run_leaves_its_forecast_and_the_report_sets_it_beside_the_run(dist_llm: Run, corpus: Path, tmp_path: Path) -> None:
    done = dist_llm("train", LLAMA, f"data.path={corpus}", f"run_dir={tmp_path}", "train.steps=6", "train.threads=1", *WIDE)
    assert done.returncode == 0, done.stderr
    run_dir = next(tmp_path.rglob("plan.json")).parent
    plan = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))
    assert (plan["ranks"], plan["engine"], plan["attempt"], plan["start_step"]) == (1, "plain", 1, 0)
    time, memory = plan["time"], plan["memory"]
    assert 0 < time["low_s"] < time["step_s"] < time["high_s"]
    assert re.search(r"cpu\.yaml, with matrix products at the [0-9]+ GFLOP/s", time["rates"])
    assert memory["parts"]["parameters"] == rank_memory(_tiny(), 1, plain=True).parameters
    assert memory["baseline_bytes"] > 100e6  # Python and torch, which the process holds before there is an engine
    assert memory["baseline_bytes"] < max(r["memory_bytes"] for r in records(run_dir))
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "Predicted and measured" in page and "step time" in page


def test_a_broken_machine_file_is_a_reason_in_the_forecast_and_not_the_end_of_the_run(dist_llm: Run, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "machine.yaml").write_text("name: mine\n", encoding="utf-8")
    words = (f"data.path={corpus}", f"run_dir={tmp_path}", "train.steps=2", "train.threads=1")
    done = dist_llm("train", LLAMA, *words)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert "machine.yaml: missing device" in plan["time"]["reason"] and "step_s" not in plan["time"]
    assert plan["memory"]["bytes"] > 0


@pytest.mark.parametrize(
    ("name", "memory", "found"),
    [
        ("NVIDIA A100-SXM4-40GB", 42.4e9, "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", 85.0e9, "a100-80g"),
        ("NVIDIA H100 80GB HBM3", 85.0e9, "h100-80g"),
        ("NVIDIA H200", 150.1e9, "h200"),
        ("Tesla V100-SXM2-32GB", 34.1e9, "v100-32g"),
    ],
)
def test_a_gpu_is_known_by_its_name_and_its_memory(name: str, memory: float, found: str) -> None:
    assert cluster_of_gpu(name, memory).name == found


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA A100-PCIE-80GB", "NVIDIA L40S", "NVIDIA GH200 480GB"])
def test_a_gpu_that_no_description_is_of_is_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no cluster description is of the device .* bench machine"):
        cluster_of_gpu(name, 85.0e9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_cpu_the_products_of_the_run_go_at_the_measured_rate(precision: str) -> None:
    config, rate = _tiny(f"precision={precision}"), 60e9
    cluster = measured_cluster(load_cluster("cpu"), config, rate, per_node=2)
    tokens, d, ffn = 128, 64, 192
    products = ((tokens, ffn, d), (tokens, d, ffn), (d, ffn, tokens))
    seconds = sum(gemm_seconds(*shape, cluster, precision) - cluster.launch for shape in products)
    # Equal but for the rounding of a few divisions.
    assert 3 * 2 * tokens * d * ffn / seconds == pytest.approx(rate, rel=1e-9)
    assert cluster.attention_forward * cluster.peak(precision) <= rate and cluster.gpus_per_node == 2


def test_twice_the_rate_of_a_cpu_is_a_shorter_step_and_the_interval_holds_it() -> None:
    slow, fast = (
        forecast_time(_tiny(*WIDE), 1, measured_cluster(load_cluster("cpu"), _tiny(*WIDE), rate, per_node=1), plain=True, peak_flops=rate)
        for rate in (50e9, 100e9)
    )
    assert slow["step_s"] > 1.5 * fast["step_s"]  # launches and memory traffic, which stay, are under a third of it
    assert slow["low_s"] < slow["step_s"] < slow["high_s"] and slow["mfu_low"] < slow["mfu"] < slow["mfu_high"]
    assert any("guess" in note for note in slow["notes"])


def test_no_time_is_said_of_a_micro_batch_that_is_mostly_the_hosts_own_work() -> None:
    cluster = measured_cluster(load_cluster("cpu"), _tiny(), 60e9, per_node=1)
    answer = forecast_time(_tiny(), 1, cluster, plain=True, peak_flops=60e9)
    assert set(answer) == {"reason"} and "ms; below 50 ms" in answer["reason"]


def test_no_time_is_said_of_a_run_that_offloads() -> None:
    answer = forecast_time(_tiny("parallel.offload_optimizer=cpu"), 2, load_cluster("h200"), plain=False, peak_flops=None)
    assert set(answer) == {"reason"} and "offloads" in answer["reason"]


def test_the_memory_compared_leaves_out_what_the_measured_figure_does_not_contain() -> None:
    plain, host, device = (
        forecast_memory(_tiny(), ranks, plain=ranks == 1, on_gpu=on_gpu) for ranks, on_gpu in ((1, False), (2, False), (2, True))
    )
    assert set(plain["left_out"]) == set(device["left_out"]) == {"slack"} and set(host["left_out"]) == {"slack", "buffers"}
    for answer in (plain, host, device):
        assert answer["bytes"] == sum(answer["parts"].values()) - sum(answer["parts"][name] for name in answer["left_out"])


def test_traffic_is_summed_over_collectives_by_group() -> None:
    answer = forecast_traffic(_tiny("parallel.tp=2"), RankGrid({"tp": 2, "dp": 2}), 0)
    assert answer["bytes"] == pytest.approx(sum(answer["groups"].values())) and "tp" in answer["groups"]
