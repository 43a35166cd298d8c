"""The dotted keys of the schema, and which of them was probably meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher, get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from dist_llm.config.schema import RunConfig, Section

__all__ = ["KEYS", "SYNONYMS", "choices", "kind", "nearest_key", "section_class", "values_by_key"]

# What other trainers call it. Names so far from ours that no measure of distance finds them.
SYNONYMS = {
    "batch": "train.batch_size",
    "global_batch_size": "train.batch_size",
    "grad_clip": "optim.clip_norm",
    "gradient_checkpointing": "parallel.recompute",
    "hidden_size": "model.d_model",
    "intermediate_size": "model.ffn_dim",
    "learning_rate": "optim.lr",
    "max_position_embeddings": "model.max_seq_len",
    "max_steps": "train.steps",
    "n_embd": "model.d_model",
    "n_head": "model.num_heads",
    "n_layer": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "num_hidden_layers": "model.num_layers",
    "num_key_value_heads": "model.num_kv_heads",
    "save_interval": "checkpoint.every",
    "tie_word_embeddings": "model.tie_embeddings",
    "zero_stage": "parallel.zero",
}


def section_class(field: FieldInfo) -> type[Section] | None:
    """The section a field holds, or ``None`` for a plain value."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _plain_type(field: FieldInfo) -> Any:
    annotation = field.annotation
    if get_origin(annotation) in (Union, UnionType):
        others = [a for a in get_args(annotation) if a is not NoneType]
        return others[0] if len(others) == 1 else annotation
    return annotation


def choices(field: FieldInfo) -> tuple[Any, ...]:
    """The values a field is limited to; empty when it is not."""
    plain = _plain_type(field)
    return get_args(plain) if get_origin(plain) is Literal else ()


def kind(field: FieldInfo) -> str:
    """What a value of the field must be, in words that follow "must be"."""
    if options := choices(field):
        return "one of " + ", ".join(str(option) for option in options)
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[_plain_type(field)]


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        inner = section_class(field)
        if inner is None:
            yield prefix + name, field
        else:
            yield from _walk(inner, f"{prefix}{name}.")


# Every value a config can hold, in the order of the schema.
KEYS: Mapping[str, FieldInfo] = dict(_walk(RunConfig, ""))

_SECTIONS = tuple(name for name, field in RunConfig.model_fields.items() if section_class(field) is not None)


def values_by_key(config: Section, prefix: str = "") -> dict[str, Any]:
    """Each value of ``config`` under its dotted key, in the order of the schema."""
    values: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            values.update(values_by_key(value, f"{prefix}{name}."))
        else:
            values[prefix + name] = value
    return values


def nearest_key(key: str) -> str | None:
    """The known key that the unknown ``key`` most likely stands for, looked for in its own section first, then everywhere."""
    section, _, name = key.rpartition(".")
    namesakes = [known for known in KEYS if known.rpartition(".")[2] == name]
    if namesakes:
        return max(namesakes, key=lambda known: SequenceMatcher(None, known, key).ratio())
    # Other trainers' names are recognised with a typo too: learning_rte.
    if near := get_close_matches(name, SYNONYMS, n=1, cutoff=0.85):
        return SYNONYMS[near[0]]
    siblings = [known for known in KEYS if known.rpartition(".")[0] == section]
    candidates = siblings + ([] if section else list(_SECTIONS))
    names = [known.rpartition(".")[2] for known in candidates]
    if near := get_close_matches(name, names, n=1):
        return candidates[names.index(near[0])]
    if near := get_close_matches(key, KEYS, n=1, cutoff=0.75):
        return near[0]
    everywhere = [known.rpartition(".")[2] for known in KEYS]
    if near := get_close_matches(name, everywhere, n=1, cutoff=0.75):
        return list(KEYS)[everywhere.index(near[0])]
    return None
