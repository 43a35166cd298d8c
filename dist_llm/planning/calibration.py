"""The constants fitted to published runs: one factor and one spread for each hardware generation.

``dist-llm plan predict tests/data/published_runs.csv`` fits and prints them; a test holds this table to that fit.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CALIBRATION", "Calibration", "calibration_of"]


@dataclass(frozen=True)
class Calibration:
    """``scale``: measured over modelled time. ``spread``: log error that nine of ten held-out published runs stay within."""

    scale: float
    spread: float


CALIBRATION = {
    "volta": Calibration(scale=0.846, spread=0.201),
    "ampere": Calibration(scale=1.111, spread=0.160),
    "hopper": Calibration(scale=1.218, spread=0.260),
    "blackwell": Calibration(scale=1.357, spread=0.316),
}
_UNKNOWN = Calibration(scale=1.2, spread=0.4)  # between the known ones, and as uncertain as the worst of them


def calibration_of(generation: str) -> Calibration:
    """The constants of ``generation``; of hardware without published runs, a guess with a wide interval."""
    return CALIBRATION.get(generation, _UNKNOWN)
