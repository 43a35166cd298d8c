"""What is asked, made definite: which model, how many tokens, which batch, on how many devices, in what time.

Whatever is left open comes from the scaling law: the model from FLOPs, FLOPs from devices and days, tokens from the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_llm.config.schema import RunConfig
from dist_llm.planning.advice import Advice, advise, batch_rows, worth, worth_params
from dist_llm.planning.amounts import Fleet
from dist_llm.planning.answer import num_steps
from dist_llm.planning.count_shapes import ShapeCount, shape_params
from dist_llm.planning.laws import ChinchillaLaw
from dist_llm.planning.saving import AUTO, Kernels
from dist_llm.planning.search import Search
from dist_llm.planning.shapes import ModelShape
from dist_llm.utils.errors import ConfigError

__all__ = ["Question", "about_flops", "about_model", "about_time", "nearest_shape", "tokens_in_time"]

_ROUNDS = 8


@dataclass(frozen=True)
class Question:
    """tokens_said: tokens were given, not advised. advice: set where the law chose the model. seconds: the deadline."""

    model: ModelShape
    count: ShapeCount
    tokens: float
    tokens_said: bool
    batch_size: int
    precision: str
    law: ChinchillaLaw
    seconds: float | None = None
    config: RunConfig | None = None
    advice: Advice | None = None

    @property
    def kernels(self) -> Kernels:
        """What the config asks for; of an advised model, nothing."""
        return Kernels.of(self.config) if self.config is not None else AUTO

    @property
    def flops(self) -> float:
        """6 FLOPs a token and parameter that it meets."""
        return 6.0 * self.count.active * self.tokens

    @property
    def loss(self) -> float:
        """By the law, nats per token of its own text."""
        return worth(self.model, self.count, self.tokens, self.law)


def about_model(
    model: ModelShape,
    law: ChinchillaLaw,
    *,
    tokens: float | None,
    gpus: int,
    batch_size: int | None,
    precision: str,
    seconds: float | None,
    config: RunConfig | None = None,
) -> Question:
    """A question about a given model; without tokens, as many as make it the best model for its compute."""
    count = shape_params(model)
    wanted = tokens if tokens is not None else law.optimal_tokens(worth_params(model, count))
    rows = batch_size if batch_size is not None else batch_rows(6.0 * count.active * wanted, model.seq_len, gpus)
    return Question(model, count, wanted, tokens is not None, rows, precision, law, seconds, config)


def about_flops(
    flops: float,
    ladder: list[ModelShape],
    law: ChinchillaLaw,
    *,
    gpus: int,
    batch_size: int | None,
    precision: str,
    seconds: float | None,
    is_cut: bool = False,
) -> Question:
    """The model and tokens that the law advises for ``flops``; is_cut: see ``advise``."""
    advice = advise(flops, ladder, law, is_cut=is_cut)
    rows = batch_size if batch_size is not None else batch_rows(flops, advice.model.seq_len, gpus)
    return Question(advice.model, advice.count, advice.tokens, False, rows, precision, law, seconds, None, advice)


def about_time(
    fleet: Fleet,
    seconds: float,
    ladder: list[ModelShape],
    law: ChinchillaLaw,
    *,
    batch_size: int | None,
    precision: str,
    limit_bytes: float | None = None,
) -> tuple[Question, Search]:
    """The model that ``fleet`` trains best in ``seconds``, and the search of its layouts.

    FLOPs depend on the speed, the speed on the model, the model on the FLOPs: from 40 % of the peak, round after round until the
    model stays. A model that does not fit makes way for the next smaller one.

    Raises:
        ConfigError: no model of the ladder fits, or the time is too short for one.
    """
    flops = 0.4 * fleet.gpus * fleet.cluster.peak(precision) * seconds
    seen: list[ModelShape] = []
    is_cut = False
    answer: tuple[Question, Search] | None = None
    for _ in range(_ROUNDS + len(ladder)):
        question = about_flops(
            flops, ladder, law, gpus=fleet.gpus, batch_size=batch_size, precision=precision, seconds=seconds, is_cut=is_cut
        )
        model = question.model
        search = Search(model, fleet.gpus, fleet.cluster, question.batch_size, precision, limit_bytes)
        found = search.best(1)
        if not found:
            ladder, is_cut = ladder[: ladder.index(model)], True
            if len(ladder) < 2:
                raise ConfigError(
                    f"no model of the ladder has a layout that fits {fleet}; give a larger --gpu-memory or another --batch-size"
                )
            continue
        tokens = tokens_in_time(seconds, found[0].step.total_s, question.batch_size, model.seq_len)
        if tokens is None:
            raise ConfigError(f"{seconds:g} s are less than one step of the smallest model on {fleet}; give more time")
        assert question.advice is not None
        flops = 6.0 * question.count.active * tokens
        advice = replace(
            question.advice, flops=flops, tokens=tokens, loss=worth(model, question.count, tokens, law), best=law.optimal(flops)
        )
        answer = replace(question, tokens=tokens, advice=advice), search
        if model in seen:
            break
        seen.append(model)
    assert answer is not None
    return answer


def tokens_in_time(seconds: float, step_s: float, batch_size: int, seq_len: int) -> float | None:
    """Tokens of the whole steps that ``seconds`` are enough for; ``None`` where they are not enough for one."""
    steps = int(seconds / step_s)
    tokens = float(steps * batch_size * seq_len)
    return tokens if steps and num_steps(tokens, batch_size, seq_len) == steps else None


def nearest_shape(params: float, ladder: Sequence[ModelShape]) -> ModelShape:
    """The shape of the ladder whose parameters, all of them counted, are nearest to ``params`` in proportion."""

    def distance(shape: ModelShape) -> float:
        return max(params, shape_params(shape).total) / min(params, shape_params(shape).total)

    best = min(ladder, key=distance)
    if distance(best) > 2:
        raise ConfigError(
            f"--params {params:.3g}: the ladder of shapes goes from {shape_params(ladder[0]).total:.2g} to {shape_params(ladder[-1]).total:.2g} "
            "parameters; describe the model in a config: --model CONFIG"
        )
    return best
