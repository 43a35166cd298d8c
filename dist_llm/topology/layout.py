"""A way to divide a run over ranks, as a value with a short name.

The name is canonical: it leaves out what is as usual, ``parse_layout`` reads it back, and certificates, plans and messages
use it (``tp2-sp-pp2-zero1-dp2``). Whether a model can run at a layout is not asked here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

from dist_llm.topology.grid import RankGrid
from dist_llm.utils.errors import ConfigError

__all__ = ["STANDARD", "CpKind", "Layout", "Recompute", "Schedule", "parse_layout"]

CpKind = Literal["ring", "all_to_all"]
Recompute = Literal["none", "selective", "full"]
Schedule = Literal["1f1b", "interleaved"]


@dataclass(frozen=True)
class Layout:
    """How one run is divided. What has no meaning without its axis is set to its default, so equal divisions are equal values.

    Raises ``ConfigError`` (a ``ValueError``) for a value that no model could run at.
    """

    tp: int = 1  # ranks that share a layer's matrices
    pp: int = 1  # pipeline stages
    cp: int = 1  # ranks that share a row's columns
    dp: int = 1  # ranks with rows of their own
    zero: int = 0  # ZeRO stage, over dp x cp
    sequence_parallel: bool = False  # norms and residuals divided over tp along the row
    cp_kind: CpKind = "ring"
    recompute: Recompute = "none"
    schedule: Schedule = "1f1b"
    chunks: int = 1  # parts of the model a stage holds: 1 under 1f1b, 2 or more under interleaved
    micro_batch: int | None = None  # rows a rank holds at once; None leaves it to the run
    uneven: bool = False  # micro-batches with different numbers of valid targets

    def __post_init__(self) -> None:
        for axis in ("tp", "pp", "cp", "dp"):
            if (size := getattr(self, axis)) < 1:
                raise ConfigError(f"layout: {axis} is {size}; an axis has at least 1 rank")
        if self.zero not in (0, 1, 2, 3):
            raise ConfigError(f"layout: zero is {self.zero}; ZeRO has the stages 0, 1, 2 and 3")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ConfigError(f"layout: micro_batch is {self.micro_batch}; a micro-batch has at least 1 row")
        for field, options in (("cp_kind", CpKind), ("recompute", Recompute), ("schedule", Schedule)):
            if (value := getattr(self, field)) not in get_args(options):
                raise ConfigError(f"layout: {field} is {value}; it is one of {', '.join(get_args(options))}")
        if self.schedule == "interleaved" and self.chunks < 2:
            raise ConfigError(f"layout: chunks is {self.chunks}; schedule interleaved needs at least 2 chunks a stage")
        if self.schedule == "1f1b" and self.chunks != 1:
            raise ConfigError(f"layout: chunks is {self.chunks}; schedule 1f1b has 1 chunk a stage, schedule interleaved has several")
        meaningless: dict[str, object] = {}
        if self.tp == 1:
            meaningless["sequence_parallel"] = False
        if self.cp == 1:
            meaningless["cp_kind"] = "ring"
        if self.pp == 1:
            meaningless |= {"schedule": "1f1b", "chunks": 1}
        for field, default in meaningless.items():
            object.__setattr__(self, field, default)

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def zero_size(self) -> int:
        """Ranks over which gradients are summed and ZeRO divides: context ranks see different tokens with the same weights."""
        return self.dp * self.cp

    @property
    def grid(self) -> RankGrid:
        """The ranks on their axes, in the usual order."""
        return RankGrid({"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp})

    @property
    def name(self) -> str:
        """Canonical short text that ``parse_layout`` reads back; a single plain rank is called ``single``."""
        words = []
        if self.tp > 1:
            words.append(f"tp{self.tp}")
        if self.sequence_parallel:
            words.append("sp")
        if self.pp > 1:
            words.append(f"pp{self.pp}")
        if self.schedule == "interleaved":
            words.append(f"interleaved{self.chunks}")
        if self.cp > 1:
            words += [f"cp{self.cp}", "ring" if self.cp_kind == "ring" else "a2a"]
        if self.zero > 0 or self.dp > 1:
            words.append(f"zero{self.zero}")
        if self.dp > 1:
            words.append(f"dp{self.dp}")
        if self.recompute != "none":
            words.append(f"recompute-{self.recompute}")
        if self.micro_batch is not None:
            words.append(f"mb{self.micro_batch}")
        if self.uneven:
            words.append("uneven")
        return "-".join(words) or "single"

    def __str__(self) -> str:
        return self.name


# The words of a name. Those with a number after them, and the field it sets:
_NUMBERED = {"tp": "tp", "pp": "pp", "cp": "cp", "dp": "dp", "zero": "zero", "interleaved": "chunks", "mb": "micro_batch"}
# and those that stand for a value; all_to_all is what the config says.
_PLAIN: dict[str, tuple[str, Any]] = {
    "sp": ("sequence_parallel", True),
    "ring": ("cp_kind", "ring"),
    "a2a": ("cp_kind", "all_to_all"),
    "all_to_all": ("cp_kind", "all_to_all"),
    "1f1b": ("schedule", "1f1b"),
    "recompute-none": ("recompute", "none"),
    "recompute-selective": ("recompute", "selective"),
    "recompute-full": ("recompute", "full"),
    "uneven": ("uneven", True),
}
# A field that says something only where the axis has two ranks or more.
_NEEDS = {"sequence_parallel": "tp", "cp_kind": "cp", "schedule": "pp"}


def parse_layout(text: str) -> Layout:
    """The layout called ``text``: words in any order, separated by ``-``, ``.``, ``,``, a middle dot or spaces.

    Raises ``ConfigError`` (a ``ValueError``) that names the word, and the nearest one there is.
    """
    values: dict[str, Any] = {}
    for word in _words(text):
        for field, value in _meaning(word, text):
            if field in values:
                raise ConfigError(f"layout {text}: {word} says again what {field} is; each is said once")
            values[field] = value
    for field, axis in _NEEDS.items():
        if field in values and values.get(axis, 1) == 1:
            said = str(values[field]) if field != "sequence_parallel" else "sp"
            raise ConfigError(f"layout {text}: {said} needs {axis} of at least 2, as in {axis}2-{_example(field, values)}")
    try:
        return Layout(**values)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {text})") from None


def _words(text: str) -> list[str]:
    """The words of a name in lower case; ``recompute`` belongs together with what follows it."""
    words = [word for word in re.split(r"[-.,\u00b7\s]+", text.strip().lower()) if word]
    if not words:
        raise ConfigError("a layout has no name; say for example tp2-pp2, or single for one rank")
    if "single" in words:
        if len(words) > 1:
            raise ConfigError(f"layout {text}: single is one rank with nothing divided and stands alone; leave it out")
        return []
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "recompute":
            joined[-1] = f"recompute-{word}"
        else:
            joined.append(word)
    return joined


def _meaning(word: str, text: str) -> list[tuple[str, Any]]:
    """The fields that ``word`` sets."""
    if word in _PLAIN:
        return [_PLAIN[word]]
    if word == "interleaved":
        return [("schedule", "interleaved"), ("chunks", 2)]
    if (match := re.fullmatch(r"([a-z]+)([0-9]+)", word)) and match[1] in _NUMBERED:
        number = (_NUMBERED[match[1]], int(match[2]))
        return [("schedule", "interleaved"), number] if match[1] == "interleaved" else [number]
    raise ConfigError(f"layout {text}: no word {word}; {_nearest(word)}")


def _nearest(word: str) -> str:
    """Which word was probably meant, or all there are."""
    if word in get_args(Recompute):
        return f"did you mean recompute-{word}?"
    if word == "recompute":
        return "did you mean recompute-selective or recompute-full?"
    if near := get_close_matches(word, _PLAIN, n=1, cutoff=0.66):
        return f"did you mean {near[0]}?"
    letters, digits = re.sub(r"[0-9]", "", word), re.sub(r"[^0-9]", "", word)
    if near := get_close_matches(letters, _NUMBERED, n=1, cutoff=0.5):
        return f"did you mean {near[0]}{digits or 2}?"
    return f"the words are {', '.join([*(f'{name}N' for name in _NUMBERED), *_PLAIN, 'single'])}"


def _example(field: str, values: dict[str, Any]) -> str:
    if field == "sequence_parallel":
        return "sp"
    if field == "cp_kind":
        return "ring" if values[field] == "ring" else "a2a"
    return f"interleaved{values['chunks']}" if values[field] == "interleaved" else "1f1b"


def _standard() -> tuple[Layout, ...]:
    single = [Layout(tp=2), Layout(tp=4), Layout(tp=2, sequence_parallel=True), Layout(pp=2), Layout(pp=4)]
    single += [Layout(cp=2), Layout(cp=2, cp_kind="all_to_all")]
    single += [Layout(dp=2, zero=zero) for zero in range(4)] + [Layout(dp=4, zero=3)]
    single += [Layout(recompute="selective"), Layout(recompute="full")]
    # One row at a time: there is more than one micro-batch on a rank as soon as the batch has more rows than ranks.
    single += [Layout(dp=2, zero=1, micro_batch=1, uneven=True)]
    pairs = [Layout(tp=2, pp=2), Layout(tp=2, cp=2), Layout(tp=2, cp=2, cp_kind="all_to_all")]
    pairs += [Layout(tp=2, dp=2, zero=zero) for zero in (1, 2, 3)] + [Layout(pp=2, dp=2, zero=1)]
    pairs += [Layout(cp=2, zero=zero) for zero in (1, 2, 3)]
    pairs += [Layout(pp=2, cp=2), Layout(pp=2, cp=2, cp_kind="all_to_all")]
    triples = [Layout(tp=2, pp=2, dp=2, zero=1), Layout(tp=2, cp=2, dp=2, zero=2)]
    return (*single, *pairs, *triples)


# What ``dist-llm verify`` runs when no layout is named, beside the config's own.
STANDARD: tuple[Layout, ...] = _standard()
