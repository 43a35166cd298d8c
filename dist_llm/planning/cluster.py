"""What a cluster is made of: the rates of one device and of the links between devices, read from ``configs/clusters/*.yaml``.

All figures are public ones (data sheets, published kernel benchmarks), each file names its sources. The only number that comes
from training runs is the calibration constant of a hardware generation, which lives in ``calibrate.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_llm.planning.implementations import Device
from dist_llm.utils.errors import ConfigError

__all__ = ["Cluster", "cluster_names", "load_cluster"]

_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "clusters"
_REQUIRED = (
    "name", "device", "generation", "memory_gb", "peak_tflops", "matmul_fraction", "multiprocessors", "memory_gb_per_s",
    "gpus_per_node", "nvlink_gb_per_s", "network_gb_per_s", "attention",
)  # fmt: skip
_DEFAULTS = {
    "power_watts": 0.0, "nominal_watts": 0.0, "link_efficiency": 0.8, "network_efficiency": 0.85, "nvlink_latency_us": 2.0,
    "network_latency_us": 6.0, "launch_us": 4.0,
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Rates in FLOP/s, bytes/s and seconds; each per device and per direction."""

    name: str
    device: str
    generation: str
    memory_bytes: float
    peaks: tuple[tuple[str, float], ...]  # precision: dense FLOP/s of the data sheet
    matmul_fraction: float  # share of the peak that a large matrix product reaches
    multiprocessors: int
    memory_bandwidth: float
    gpus_per_node: int  # devices that share the fast links
    nvlink_bandwidth: float
    network_bandwidth: float
    attention_forward: float  # share of the peak that fused attention reaches at head size 128
    attention_backward: float
    clock_fraction: float  # sustained clock over the nominal one, below 1 for a part limited in power
    link_efficiency: float  # share of a link's rate that large collectives reach inside a node
    network_efficiency: float
    nvlink_latency: float
    network_latency: float
    launch: float  # from one kernel to the next

    @property
    def kind(self) -> Device:
        """What torch calls such a device; it decides which kernels a run takes."""
        return "cpu" if self.generation == "cpu" else "cuda"

    def peak(self, precision: str) -> float:
        """Dense FLOP/s of ``precision``; a format that the device lacks runs as the next wider one it has."""
        name = precision
        while True:
            for known, rate in self.peaks:
                if known == name:
                    return rate
            if name not in _WIDER:
                table = ", ".join(known for known, _ in self.peaks)
                raise ConfigError(f"cluster {self.name}: no rate for precision '{precision}'; known: {table}")
            name = _WIDER[name]


_WIDER = {"fp4": "fp8", "fp8": "bf16", "bf16": "fp16", "fp16": "fp32"}


def cluster_names() -> list[str]:
    """Names of the descriptions that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


@functools.cache
def load_cluster(name: str) -> Cluster:
    """The cluster ``name``: one of ``configs/clusters``, or a path to a YAML file.

    Raises:
        ConfigError: no such description, or one that lacks a figure or has one out of its range.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name.lower()}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        raise ConfigError(
            f"there is no cluster description '{name}' ({path}); known: {', '.join(cluster_names())}, or give the path of a YAML file"
        ) from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a cluster description is a mapping of keys, this is {type(values).__name__}")
    return _build(path, values)


def _build(path: Path, values: Mapping[str, Any]) -> Cluster:
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise ConfigError(f"{path}: missing {', '.join(missing)}")
    unknown = [str(key) for key in values if key not in _REQUIRED and key not in _DEFAULTS]
    if unknown:
        raise ConfigError(f"{path}: unknown key {', '.join(unknown)}; known: {', '.join((*_REQUIRED, *_DEFAULTS))}")
    filled = {**_DEFAULTS, **values}

    def number(key: str, value: Any, low: float, high: float = float("inf")) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
            limit = f"a number above {low:g}" + (f" and at most {high:g}" if high != float("inf") else "")
            raise ConfigError(f"{path}: {key} must be {limit}, got {value!r}")
        return float(value)

    def table(key: str) -> dict[str, Any]:
        value = filled[key]
        if not isinstance(value, dict) or not value:
            raise ConfigError(f"{path}: {key} must be a mapping of names to numbers, got {value!r}")
        return value

    attention = table("attention")
    for key in ("forward", "backward"):
        if key not in attention:
            raise ConfigError(f"{path}: attention.{key} is missing")
    clock = 1.0
    if filled["power_watts"]:
        power = number("power_watts", filled["power_watts"], 0)
        nominal = number("nominal_watts", filled["nominal_watts"], 0)
        # Dynamic power grows with f V^2, and V with f: the clock that a power limit sustains goes with its cube root.
        clock = min(1.0, (power / nominal) ** (1 / 3))
    return Cluster(
        name=str(values["name"]),
        device=str(values["device"]),
        generation=str(values["generation"]),
        memory_bytes=number("memory_gb", filled["memory_gb"], 0) * 1e9,
        peaks=tuple((str(p), number(f"peak_tflops.{p}", rate, 0) * 1e12) for p, rate in table("peak_tflops").items()),
        matmul_fraction=number("matmul_fraction", filled["matmul_fraction"], 0, 1),
        multiprocessors=int(number("multiprocessors", filled["multiprocessors"], 0)),
        memory_bandwidth=number("memory_gb_per_s", filled["memory_gb_per_s"], 0) * 1e9,
        gpus_per_node=int(number("gpus_per_node", filled["gpus_per_node"], 0)),
        nvlink_bandwidth=number("nvlink_gb_per_s", filled["nvlink_gb_per_s"], 0) * 1e9,
        network_bandwidth=number("network_gb_per_s", filled["network_gb_per_s"], 0) * 1e9,
        attention_forward=number("attention.forward", attention["forward"], 0, 1),
        attention_backward=number("attention.backward", attention["backward"], 0, 1),
        clock_fraction=clock,
        link_efficiency=number("link_efficiency", filled["link_efficiency"], 0, 1),
        network_efficiency=number("network_efficiency", filled["network_efficiency"], 0, 1),
        nvlink_latency=number("nvlink_latency_us", filled["nvlink_latency_us"], 0) * 1e-6,
        network_latency=number("network_latency_us", filled["network_latency_us"], 0) * 1e-6,
        launch=number("launch_us", filled["launch_us"], 0) * 1e-6,
    )
