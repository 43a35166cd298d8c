"""The YAML that configs are written in: the safe loader with fewer surprises, and a line number on every key.

Only true and false are booleans (``off`` and ``no`` are text), ``3e-4`` is a number, dates and octal numbers do not exist. Duplicate
keys, aliases and tags of other types are refused; ``extends`` (source.py) is the one way to share values.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from dist_llm.config.problems import Place, Problem

__all__ = ["ConfigLoader", "Entry", "Tree", "parse"]

MAX_DEPTH = 32
MAX_DIGITS = 100  # of a whole number; Python refuses to print very long ones

_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Entry:
    """A value and where it stands; a mapping's value is a ``Tree``."""

    value: Any
    place: Place


Tree = dict[str, Entry]


class ConfigLoader(yaml.SafeLoader):
    """The safe loader, with the scalar types of this file and without aliases."""

    # A class attribute of its own, or the resolvers below would be added to every user of PyYAML's safe loader.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose as PyYAML does, but refuse aliases and nesting that no config needs."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, f"aliases (*{event.anchor}) are not supported; repeat the value, or share it with `extends`", event.start_mark
            )
        if self.depth >= MAX_DEPTH:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    ConfigLoader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first)


def _to_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"more than {MAX_DIGITS} digits")
    return int(text, 16) if text.lower().startswith("0x") else int(text)


def _to_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _to_bool(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise ValueError(f"not true or false: {text!r}") from None


_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda text: None,
    _TAG + "bool": _to_bool,
    _TAG + "int": _to_int,
    _TAG + "float": _to_float,
    _TAG + "str": str,
}


def parse(text: str, file: str, problems: list[Problem], *, lines: bool = True) -> Entry | None:
    """Read one YAML document; ``None`` when it holds nothing, or nothing that can be read.

    Args:
        text: the document.
        file: what places and problems call it.
        problems: gets one entry for each thing wrong; what can still be read is returned all the same.
        lines: whether line numbers mean anything (they do not for a value on the command line).
    """
    try:
        loader = ConfigLoader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        problems.append(_syntax_problem(error, text, file, lines))
        return None
    return None if node is None else _entry(node, "", file, problems, lines)


def _syntax_problem(error: yaml.YAMLError, text: str, file: str, lines: bool) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        message = f"the character {chr(error.character)!a} is not allowed in YAML; remove it, or write it as an escape in double quotes"
    else:
        assert isinstance(error, yaml.MarkedYAMLError), error
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        message = f"not valid YAML: {error.problem or error.context}"
        if "'\\t'" in message:
            message = "not valid YAML: a tab where YAML allows only spaces; indent with spaces"
        elif "expected a single document" in (error.context or ""):
            message = "more than one YAML document; a config is one, without `---` inside"
        elif "mapping values are not allowed" in message:
            message += " (a colon too many, or a line indented further than the one above)"
    return Problem(file, line if lines else None, "", message)


def _entry(node: yaml.Node, key: str, file: str, problems: list[Problem], lines: bool) -> Entry:
    place = Place(file, node.start_mark.line + 1 if lines else None)
    if isinstance(node, yaml.MappingNode):
        return Entry(_tree(node, key, file, problems, lines), place)
    if isinstance(node, yaml.SequenceNode):
        return Entry([_plain(_entry(item, key, file, problems, lines).value) for item in node.value], place)
    convert = _SCALARS.get(node.tag)
    if convert is None:
        problems.append(Problem(place.file, place.line, key, f"the tag {node.tag} is not allowed; write a plain value"))
        return Entry(None, place)
    try:
        return Entry(convert(node.value), place)
    except ValueError:
        kind = node.tag.removeprefix(_TAG)
        problems.append(Problem(place.file, place.line, key, f"{node.value[:40]!r} cannot be read as {kind}"))
        return Entry(None, place)


def _tree(node: yaml.MappingNode, prefix: str, file: str, problems: list[Problem], lines: bool) -> Tree:
    tree: Tree = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1 if lines else None
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(Problem(file, line, prefix, "a key must be a word, not a list or a mapping"))
            continue
        name = key_node.value
        key = f"{prefix}.{name}" if prefix else name
        if name in tree:
            first = tree[name].place
            where = f", first on line {first.line}" if first.line is not None else ""
            problems.append(Problem(file, line, key, f"given twice{where}; keep one"))
            continue
        # The place of a value is the line of its key: that is the line a person looks for.
        tree[name] = Entry(_entry(value_node, key, file, problems, lines).value, Place(file, line))
    return tree


def _plain(value: Any) -> Any:
    # Inside a list nothing is merged, so its mappings need no places.
    return {name: _plain(entry.value) for name, entry in value.items()} if isinstance(value, dict) else value
