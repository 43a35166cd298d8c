"""How good predictions of published runs are: errors, and whether layouts of one sweep come out in the right order."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dist_llm.planning.calibrate import Prediction

__all__ = ["Accuracy", "accuracy_of", "percentile"]


@dataclass(frozen=True)
class Accuracy:
    """Of |predicted - measured| / measured over rows, and of pairs of layouts of one sweep."""

    rows: int
    median: float
    p90: float
    worst: float
    pairs: int
    pairs_right: int

    @property
    def order(self) -> float:
        """Share of the pairs whose faster layout is predicted to be the faster; nan without pairs."""
        return self.pairs_right / self.pairs if self.pairs else math.nan


def accuracy_of(predictions: Sequence[Prediction]) -> Accuracy:
    """The accuracy of ``predictions``; at least one.

    A sweep is one document's runs of one model and row length on one cluster (device and number of them). Its layouts are compared
    by their time per row of the batch; equal layouts and equal measured times say nothing about order.
    """
    if not predictions:
        raise ValueError("no predictions to judge")
    errors = [abs(p.rel_err) for p in predictions]
    sweeps: dict[tuple[object, ...], list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        sweeps[prediction.run.sweep].append(prediction)
    pairs = right = 0
    for sweep in sweeps.values():
        for a, b in itertools.combinations(sweep, 2):
            measured_a, measured_b = _per_row(a.run.measured_s, a), _per_row(b.run.measured_s, b)
            if a.run.layout == b.run.layout or measured_a == measured_b:
                continue
            pairs += 1
            predicted_a, predicted_b = _per_row(a.seconds, a), _per_row(b.seconds, b)
            right += (predicted_a < predicted_b) == (measured_a < measured_b) and predicted_a != predicted_b
    return Accuracy(len(errors), statistics.median(errors), percentile(errors, 0.9), max(errors), pairs, right)


def percentile(values: Sequence[float], share: float) -> float:
    """Value that ``share`` of ``values`` do not exceed, linear between neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _per_row(seconds: float, prediction: Prediction) -> float:
    return seconds / prediction.run.layout.global_batch
