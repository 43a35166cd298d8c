"""One number per hardware generation: how much longer published steps take than the model of public figures says.

The constant is a factor on the whole step. For a row of published runs it is fitted on the rows of *other* documents on the same
generation where there are any (leave one source out), so that a prediction never has seen its own source. Documents weigh the same,
whatever their number of rows: the constant is the median over documents of each one's median. A generation with one document is
fitted on it.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dist_llm.planning.calibration import CALIBRATION, Calibration
from dist_llm.planning.published import Run
from dist_llm.planning.step_time import step_time

__all__ = ["Prediction", "fit_calibration", "fit_scale", "predict_runs", "raw_seconds"]

ENOUGH = 10  # rows that a generation's only document needs; with fewer the constant would just repeat them, and the shipped one is taken
FEW = 20  # rows below which a generation's own residuals say too little about its spread


@dataclass(frozen=True)
class Prediction:
    """A row's answer, in the row's unit and as a step time."""

    run: Run
    seconds: float
    scale: float

    @property
    def predicted(self) -> float:
        """In the unit of the row."""
        return self.run.seconds_or_unit(self.seconds)

    @property
    def rel_err(self) -> float:
        """(predicted - measured) / measured, in the unit of the row."""
        return self.predicted / self.run.measured - 1.0


def raw_seconds(run: Run) -> float:
    """The step time from public figures alone."""
    return step_time(run.model, run.layout, run.cluster, software=run.system.software, scale=1.0).total_s


def fit_scale(pairs: Sequence[tuple[str, float]]) -> float:
    """The factor that centres ``pairs`` of (document, log of measured over modelled time)."""
    by_document: dict[str, list[float]] = defaultdict(list)
    for document, ratio in pairs:
        by_document[document].append(ratio)
    return math.exp(statistics.median(statistics.median(values) for values in by_document.values()))


def predict_runs(runs: Sequence[Run]) -> list[Prediction]:
    """Every run's prediction, each calibrated without the rows of its own document where its generation has another."""
    raw = [raw_seconds(run) for run in runs]
    logs = [math.log(run.measured_s / seconds) for run, seconds in zip(runs, raw, strict=True)]
    by_generation: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for run, log in zip(runs, logs, strict=True):
        by_generation[run.cluster.generation].append((run.source, log))
    predictions = []
    for run, seconds in zip(runs, raw, strict=True):
        pairs = by_generation[run.cluster.generation]
        others = [pair for pair in pairs if pair[0] != run.source]
        if others:
            scale = fit_scale(others)
        elif len(pairs) >= ENOUGH or run.cluster.generation not in CALIBRATION:
            scale = fit_scale(pairs)
        else:
            scale = CALIBRATION[run.cluster.generation].scale
        predictions.append(Prediction(run, seconds * scale, scale))
    return predictions


def fit_calibration(runs: Sequence[Run]) -> dict[str, Calibration]:
    """Each generation's constants from all of ``runs``: the scale over its documents, the spread from held-out predictions."""
    by_generation: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predict_runs(runs):
        by_generation[prediction.run.cluster.generation].append(prediction)

    def spread(predictions: Sequence[Prediction]) -> float:
        errors = sorted(abs(math.log(p.seconds / p.run.measured_s)) for p in predictions)
        return errors[min(len(errors) - 1, math.ceil(0.9 * len(errors)) - 1)]

    everything = spread([p for group in by_generation.values() for p in group])
    table = {}
    for generation, group in by_generation.items():
        scale = fit_scale([(p.run.source, math.log(p.run.measured_s / p.seconds * p.scale)) for p in group])
        table[generation] = Calibration(scale, spread(group) if len(group) >= FEW else everything)
    return table
