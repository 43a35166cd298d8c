"""A resolved config as YAML that loads again, as a hash, and beside another one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dist_llm.config.keys import values_by_key
from dist_llm.config.schema import RunConfig, Section
from dist_llm.config.syntax import ConfigLoader
from dist_llm.utils.files import sha256_bytes

__all__ = ["config_hash", "diff_configs", "dump_yaml", "scalar"]

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-")
_COMMENT_COLUMN = 48


def dump_yaml(config: RunConfig, origins: Mapping[str, str] | None = None) -> str:
    """Every value of ``config`` as YAML: loading the text gives an equal config.

    Args:
        config: what to write.
        origins: dotted key to where its value came from, written behind the value as a comment.
    """
    return "\n".join(_lines(config, "", origins or {})) + "\n"


def _lines(section: Section, prefix: str, origins: Mapping[str, str]) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield f"{indent}{name}:"
            yield from _lines(value, f"{prefix}{name}.", origins)
            continue
        line = f"{indent}{name}: {scalar(value)}"
        origin = origins.get(prefix + name)
        # A line break in a file's name must not end the comment.
        yield line if origin is None else f"{line:<{_COMMENT_COLUMN}}  # {origin if origin.isprintable() else ascii(origin)}"


def scalar(value: Any) -> str:
    """One value as YAML, written so that our loader and any YAML 1.1 loader read the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # YAML 1.1 asks for a point in front of the exponent: its loaders take 1e-05 for text.
        mantissa, e, exponent = repr(value).partition("e")
        return repr(value) if not e or "." in mantissa else f"{mantissa}.0e{exponent}"
    if isinstance(value, str):
        return value if _is_plain(value) else _quoted(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(scalar(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(key)}: {scalar(item)}" for key, item in value.items()) + "}"
    return str(value)


def _is_plain(text: str) -> bool:
    if not text or text[0] == "-" or not _PLAIN.issuperset(text):
        return False
    tags = {loader("").resolve(yaml.ScalarNode, text, (True, False)) for loader in (ConfigLoader, yaml.SafeLoader)}  # type: ignore[no-untyped-call]
    return tags == {"tag:yaml.org,2002:str"}


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).rstrip("\n")


def config_hash(config: RunConfig) -> str:
    """Hex SHA-256 of the resolved values: equal configs have equal hashes, however they were written."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256_bytes(canonical.encode("utf-8"))


def diff_configs(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """``(key, value in a, value in b)`` of each key in which the two differ, in the order of the schema."""
    theirs = values_by_key(b)
    return [(key, value, theirs[key]) for key, value in values_by_key(a).items() if value != theirs[key]]
