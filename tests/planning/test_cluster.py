from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dist_llm.planning.cluster import cluster_names, load_cluster
from dist_llm.utils.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", cluster_names())
def test_every_description_loads_and_names_its_sources(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.peak("bf16") > cluster.memory_bandwidth  # no device moves a byte faster than it multiplies
    first = (ROOT / "configs" / "clusters" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")


def test_h100_has_the_data_sheets_figures() -> None:
    # NVIDIA H100 SXM5 data sheet: 989 TFLOP/s bf16 and 1979 fp8 dense, 3.35 TB/s, NVLink 900 GB/s two-way; 8 ports of 400 Gb/s.
    h100 = load_cluster("h100-80g")
    assert (h100.peak("bf16"), h100.peak("fp8")) == (989e12, 1979e12)
    assert (h100.memory_bandwidth, h100.nvlink_bandwidth, h100.network_bandwidth) == (3350e9, 450e9, 50e9)


def test_a_format_that_the_device_lacks_runs_as_the_next_wider_one() -> None:
    a100, v100 = load_cluster("a100-80g"), load_cluster("v100-32g")
    assert a100.peak("fp8") == a100.peak("bf16")
    assert v100.peak("bf16") == v100.peak("fp16")
    with pytest.raises(ConfigError, match="precision 'int3'"):
        a100.peak("int3")


def test_a_power_limit_lowers_the_clock_by_its_cube_root() -> None:
    assert load_cluster("h100-96g-500w").clock_fraction == pytest.approx((500 / 700) ** (1 / 3))
    assert load_cluster("h100-80g").clock_fraction == 1.0


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no cluster description 'h1000'.*h100-80g"):
        load_cluster("h1000")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_gb_per_s": None}, "missing memory_gb_per_s"),
        ({"colour": "green"}, "unknown key colour"),
        ({"matmul_fraction": 1.2}, "matmul_fraction must be a number above 0 and at most 1, got 1.2"),
        ({"network_gb_per_s": "fast"}, "network_gb_per_s must be a number above 0, got 'fast'"),
        ({"peak_tflops": {}}, "peak_tflops must be a mapping"),
        ({"attention": {"forward": 0.5}}, "attention.backward is missing"),
    ],
)
def test_a_description_with_a_mistake_is_refused_by_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    values = yaml.safe_load((ROOT / "configs" / "clusters" / "h100-80g.yaml").read_text(encoding="utf-8"))
    values = {k: v for k, v in {**values, **change}.items() if v is not None}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_cluster(str(path))


def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("- a\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="mapping of keys"):
        load_cluster(str(path))
