"""What of a collective remains when it runs behind computation."""

from __future__ import annotations

__all__ = ["INTERFERENCE", "exposed_seconds"]

# A hidden collective takes multiprocessors and memory bandwidth from the computation it hides behind: NCCL runs on 16 to 32 of
# an H100's 132 multiprocessors (NCCL user guide, NCCL_MAX_CTAS).
INTERFERENCE = 0.15


def exposed_seconds(comm_s: float, compute_s: float, share: float) -> float:
    """Seconds added to ``compute_s`` by a collective of ``comm_s``, ``share`` of which may run behind it."""
    behind = min(comm_s * share, compute_s)
    return comm_s - behind + INTERFERENCE * behind
