"""Amounts as people write them: 300B tokens, 1e22 FLOPs, 14 days, 64xH100-80G."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches

from dist_llm.planning.cluster import Cluster, cluster_names, load_cluster
from dist_llm.utils.errors import ConfigError

__all__ = ["Fleet", "device_cluster", "parse_amount", "parse_bytes", "parse_experts", "parse_fleet", "whole_nodes"]

_MULTIPLES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_NUMBER = r"([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)"
_MOST_GPUS = 1 << 20
_TRAYS = {"gb200": 4, "gb300": 4}  # a compute tray of an NVL72 rack is a node of its own (NVIDIA DGX GB200 user guide)


@dataclass(frozen=True)
class Fleet:
    """``gpus`` devices of ``cluster``'s kind."""

    gpus: int
    cluster: Cluster

    @property
    def per_node(self) -> int:
        """Devices that SLURM sees in a node; the fast links may join several nodes."""
        return _TRAYS.get(self.cluster.name, self.cluster.gpus_per_node)

    @property
    def nodes(self) -> int:
        """Nodes they fill."""
        return -(-self.gpus // self.per_node)

    def __str__(self) -> str:
        return f"{self.gpus:,} x {self.cluster.device}"


def parse_amount(text: str, option: str, *, unit: str = "", example: str) -> float:
    """A positive number with an optional K, M, B (or G), T, P, E behind it.

    Args:
        text: what was written.
        option: where, for the message.
        unit: what is counted, for the message.
        example: a value that would do, for the message.

    Raises:
        ConfigError: not a number, or not above zero.
    """
    match = re.fullmatch(rf"{_NUMBER}\s*([KMGBTPE]?)", text.strip().replace("_", ""), re.IGNORECASE)
    if match is None:
        what = f"number of {unit}" if unit else "number"
        if re.fullmatch(rf"-\s*{_NUMBER}.*", text.strip()):
            raise ConfigError(f"{option} {text}: must be above zero; write for example {option} {example}")
        raise ConfigError(
            f"{option} {text}: not a {what}; write for example {option} {example} (K, M, B and T stand for thousand to trillion)"
        )
    value = float(match[1]) * _MULTIPLES[match[2].upper()]
    if not 0 < value < math.inf:
        raise ConfigError(f"{option} {text}: must be above zero; write for example {option} {example}")
    return value


def parse_bytes(text: str, option: str) -> float:
    """Gigabytes of 10^9, as on a data sheet, with or without G or GB behind them; answered in bytes."""
    match = re.fullmatch(rf"{_NUMBER}\s*(?:G|GB)?", text.strip(), re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < math.inf:
        raise ConfigError(f"{option} {text}: not a memory size in gigabytes above zero; write for example {option} 80G")
    return float(match[1]) * 1e9


def parse_experts(text: str) -> tuple[int, int]:
    """(experts, active ones) of ``8x2``: eight experts in a layer, two of which a token goes to."""
    match = re.fullmatch(r"([0-9]+)x([0-9]+)", text.strip().lower())
    if match is None:
        raise ConfigError(f"--moe {text}: say EXPERTSxACTIVE, for example --moe 8x2 for 8 experts of which a token meets 2")
    experts, active = int(match[1]), int(match[2])
    if not 1 <= active <= experts or experts < 2:
        raise ConfigError(f"--moe {text}: a token meets between 1 and all of at least 2 experts; write for example --moe 8x2")
    return experts, active


def parse_fleet(text: str) -> Fleet:
    """``64xH100-80G``: how many of which device.

    Raises:
        ConfigError: not of that form, no such device (with the nearest name), or a count out of range.
    """
    match = re.fullmatch(r"([0-9]+)\s*[xX*]\s*(\S+)", text.strip())
    if match is None:
        raise ConfigError(f"--gpus {text}: say how many of which device, for example --gpus 64xH100-80G; there are {_listed()}")
    gpus = int(match[1])
    if not 1 <= gpus <= _MOST_GPUS:
        raise ConfigError(f"--gpus {text}: the number of devices must lie between 1 and {_MOST_GPUS:,}")
    return Fleet(gpus, device_cluster(match[2], f"--gpus {text}"))


def device_cluster(name: str, said: str) -> Cluster:
    """The description of the device called ``name``: a file of configs/clusters, its device, the family if it has one member, or a path.

    Args:
        name: in upper or lower case.
        said: the option and its value, for the message.
    """
    if name.endswith((".yaml", ".yml")):
        return load_cluster(name)
    key = name.lower()
    known = cluster_names()
    if key in known:
        return load_cluster(key)
    clusters = {stem: load_cluster(stem) for stem in known}
    for cluster in clusters.values():
        if cluster.device.lower().replace(" ", "-") == key:
            return cluster
    family = [stem for stem in known if stem.startswith(f"{key}-")]
    if len(family) == 1:
        return clusters[family[0]]
    if family:
        raise ConfigError(f"{said}: {name} comes in more than one kind; say {' or '.join(family)}")
    # O and l are easily written for 0 and 1; without its memory, a device is still a good hint.
    words = {stem: stem for stem in known} | {stem.partition("-")[0]: stem for stem in reversed(known)}
    near = get_close_matches(key.replace("o", "0").replace("l", "1"), words, n=1, cutoff=0.5)
    hint = f"did you mean {words[near[0]].upper()}? " if near else ""
    raise ConfigError(f"{said}: no device is called {name}; {hint}There are {_listed()}, or give the path of a YAML file")


def whole_nodes(fleet: Fleet, said: str) -> None:
    """Raise ``ConfigError`` for more devices than a node has that do not fill nodes: SLURM gives each node as many tasks."""
    per_node = fleet.per_node
    if fleet.gpus > per_node and fleet.gpus % per_node:
        below = fleet.gpus // per_node * per_node
        raise ConfigError(f"{said}: {fleet.gpus} devices do not fill nodes of {per_node}; {below} or {below + per_node} would")


def _listed() -> str:
    return ", ".join(cluster_names())
