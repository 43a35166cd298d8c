"""One question on many numbers of devices: the table over them, the smallest that would do, and how speed grows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dist_llm.planning.answer import num_steps
from dist_llm.planning.cluster import Cluster
from dist_llm.planning.saving import AUTO, Kernels
from dist_llm.planning.search import Plan, Search
from dist_llm.planning.shapes import ModelShape

__all__ = ["MOST_GPUS", "Smallest", "gpu_counts", "over_counts", "smallest_cluster"]

MOST_GPUS = 16384


@dataclass(frozen=True)
class Smallest:
    """fits: on the fewest devices that hold the model. in_time: on the fewest that finish in time. fastest: of all counts looked at."""

    fits: Plan | None
    in_time: Plan | None
    fastest: Plan | None


def gpu_counts(most: int = MOST_GPUS) -> list[int]:
    """Powers of two up to ``most``."""
    return [1 << k for k in range(most.bit_length()) if 1 << k <= most]


def over_counts(
    model: ModelShape,
    cluster: Cluster,
    batch_size: int,
    *,
    precision: str = "bf16",
    limit_bytes: float | None = None,
    kernels: Kernels = AUTO,
    most: int = MOST_GPUS,
    weak: bool = False,
) -> Iterator[tuple[int, Plan | None]]:
    """(devices, the fastest plan on them or ``None``) for powers of two.

    weak: ``batch_size`` is the rows of one device, so that the batch grows with their number; else of the step.
    """
    for gpus in gpu_counts(most):
        rows = batch_size * gpus if weak else batch_size
        found = Search(model, gpus, cluster, rows, precision, limit_bytes, kernels).best(1)
        yield gpus, found[0] if found else None


def smallest_cluster(
    model: ModelShape,
    cluster: Cluster,
    batch_size: int,
    tokens: float,
    seconds: float | None,
    *,
    precision: str = "bf16",
    limit_bytes: float | None = None,
    kernels: Kernels = AUTO,
    most: int = MOST_GPUS,
) -> Smallest:
    """The fewest devices, of powers of two, that hold ``model``, and that read ``tokens`` tokens in ``seconds``."""
    steps = num_steps(tokens, batch_size, model.seq_len)
    fits = fastest = None
    for _, plan in over_counts(model, cluster, batch_size, precision=precision, limit_bytes=limit_bytes, kernels=kernels, most=most):
        if plan is None:
            continue
        fits = fits or plan
        if fastest is None or plan.step.total_s < fastest.step.total_s:
            fastest = plan
        if seconds is None or steps * plan.step.total_s <= seconds:
            return Smallest(fits, plan, fastest)
    return Smallest(fits, None, fastest)
