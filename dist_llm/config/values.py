"""A tree of values against the schema: unknown keys, wrong kinds, values out of range, each as one plain sentence with its place."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dist_llm.config.keys import KEYS, choices, kind, nearest_key, section_class
from dist_llm.config.problems import COMMAND_LINE, Place, Problem
from dist_llm.config.schema import RunConfig, Section
from dist_llm.config.syntax import Entry, Tree
from dist_llm.config.write import scalar

__all__ = ["Checked", "bad_keys", "check_tree", "understood", "unknown_override", "validate"]

# Values that a user is right to expect, and that wait for the part that reads them.
_NOT_YET = {
    ("precision", "fp16"): "fp16 needs loss scaling, which is not built yet; use bf16, which has the range of fp32 and needs none",
}


@dataclass
class Checked:
    """The values whose keys and kinds are right, nested as the schema is, and the place of each dotted key, sections too."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)


def bad_keys(problems: Iterable[Problem]) -> set[str]:
    """The keys of the schema that some problem is about, directly or through their section."""
    named = {problem.key for problem in problems if problem.key}
    return {key for key in KEYS if key in named or any(key.startswith(f"{name}.") for name in named)}


def check_tree(tree: Tree, problems: list[Problem]) -> Checked:
    """Sort out what the schema cannot take: unknown keys, values where sections belong, sections where values belong."""
    checked = Checked()
    checked.values = _check(tree, RunConfig, "", checked.places, problems)
    return checked


def _check(tree: Tree, section: type[Section], prefix: str, places: dict[str, Place], problems: list[Problem]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, entry in tree.items():
        key = prefix + name
        place = places[key] = entry.place
        known = section.model_fields.get(name)
        inner = section_class(known) if known is not None else None
        message = nearest = None
        if known is None:
            message, nearest = _unknown(name, key, section)
        elif inner is not None:
            # A section without lines is an empty section: what its comments held is left to the defaults.
            lines = {} if entry.value is None else entry.value
            if isinstance(lines, dict):
                values[name] = _check(lines, inner, f"{key}.", places, problems)
            else:
                message = f"a section, so its keys stand below it ({', '.join(inner.model_fields)}); {_shown(entry.value)} is a value"
        else:
            message = _kind_fault(entry, known)
            if message is None:
                values[name] = entry.value
        if message is not None:
            problems.append(Problem(place.file, place.line, key, message, nearest))
    return values


def _unknown(name: str, key: str, section: type[Section]) -> tuple[str, str | None]:
    if "." in name and key in KEYS:
        head, _, rest = key.partition(".")
        return f"a dotted key works on the command line only; in a file write `{rest}` below `{head}:`", None
    if name == "extends":
        return "extends stands at the top level of a file, not in a section", None
    nearest = nearest_key(key)
    return "unknown key" if nearest else f"unknown key; the keys here are {', '.join(section.model_fields)}", nearest


def unknown_override(key: str) -> Problem | None:
    """The problem with the dotted key of an override, if the schema does not have it."""
    section: type[Section] = RunConfig
    done = ""
    for name in key.split("."):
        known = section.model_fields.get(name)
        if known is None:
            message, nearest = _unknown(name, key, section)
            return Problem(COMMAND_LINE.file, None, key, message, nearest)
        done = f"{done}.{name}" if done else name
        inner = section_class(known)
        if inner is None:
            if done == key:
                return None
            return Problem(COMMAND_LINE.file, None, key, f"unknown key; {done} is a value, not a section", done)
        section = inner
    return None


def _kind_fault(entry: Entry, known: FieldInfo) -> str | None:
    """What pydantic would accept and we do not: true as the number 1, and numbers without an end."""
    value = entry.value
    if isinstance(value, dict):
        return f"must be {kind(known)}, not a section"
    if isinstance(value, bool) and kind(known) != "true or false":
        return _wrong_kind(value, known)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{_shown(value)} must be a finite number"
    return None


def validate(checked: Checked, file: str, problems: list[Problem], *, missing_is_known: bool) -> RunConfig | None:
    """The config, or ``None`` after adding to ``problems``.

    Args:
        checked: what ``check_tree`` let through.
        file: blamed for required keys that nothing gives.
        problems: keys that already have one are not reported again as missing.
        missing_is_known: whether everything that could give a value has been read.
    """
    try:
        return RunConfig.model_validate(checked.values)
    except ValidationError as error:
        details = error.errors(include_url=False)
    known_bad = {problem.key for problem in problems}
    for detail in details:
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "missing":
            if missing_is_known and key not in known_bad:
                place = checked.places.get(key.rpartition(".")[0], Place(file))
                problems.append(Problem(place.file, place.line, key, _missing(key)))
            continue
        place = checked.places[key]
        message, nearest = _sentence(key, detail)
        problems.append(Problem(place.file, place.line, key, message, nearest))
    return None


def _missing(key: str) -> str:
    if key in KEYS:
        return f"required, and not given: {KEYS[key].description}"
    inner = section_class(RunConfig.model_fields[key])
    assert inner is not None, key
    required = [name for name, known in inner.model_fields.items() if known.is_required()]
    return f"required section, and not given; it needs at least {', '.join(required)}"


_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _sentence(key: str, detail: ErrorDetails) -> tuple[str, str | None]:
    value, known, fault = detail["input"], KEYS[key], detail["type"]
    if isinstance(value, str) and (key, value) in _NOT_YET:
        return _NOT_YET[key, value], None
    if fault in _LIMITS:
        words, limit = _LIMITS[fault]
        return f"{_shown(value)} must be {words} {_number(detail['ctx'][limit])}", None
    if fault == "string_pattern_mismatch":
        return f"{_shown(value)} must match the pattern {detail['ctx']['pattern']}", None
    if fault == "literal_error":
        near = get_close_matches(str(value), [str(option) for option in choices(known)], n=1)
        return _wrong_kind(value, known), near[0] if near else None
    return _wrong_kind(value, known), None


def _wrong_kind(value: Any, known: FieldInfo) -> str:
    expected = kind(known)
    if value is None:
        return f"has no value; it must be {expected}"
    quotes = f'; write "{_shown(value)}"' if expected == "text" and isinstance(value, bool | int | float) else ""
    return f"{_shown(value)} must be {expected}{quotes}"


def _shown(value: Any) -> str:
    text = scalar(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def understood(checked: Checked, bad: Collection[str]) -> RunConfig:
    """A config of the values that are right, for rules that read only those; reading any other key is a mistake of the rule."""
    config = _partial(RunConfig, checked.values, "", bad)
    assert isinstance(config, RunConfig)
    return config


def _partial(section: type[Section], values: dict[str, Any], prefix: str, bad: Collection[str]) -> Section:
    right: dict[str, Any] = {}
    for name, known in section.model_fields.items():
        inner = section_class(known)
        if inner is not None:
            right[name] = _partial(inner, values.get(name, {}), f"{prefix}{name}.", bad)
        elif name in values and prefix + name not in bad:
            adapter: TypeAdapter[Any] = TypeAdapter(Annotated[known.annotation, known])  # type: ignore[arg-type]
            right[name] = adapter.validate_python(values[name])
    return section.model_construct(**right)
