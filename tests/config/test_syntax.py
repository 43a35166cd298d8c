from __future__ import annotations

import pytest
import yaml

from dist_llm.config.problems import Problem
from dist_llm.config.syntax import parse


def value_of(text: str) -> object:
    problems: list[Problem] = []
    entry = parse(f"k: {text}\n", "x.yaml", problems)
    assert entry is not None and not problems, problems
    return entry.value["k"].value


def problem_of(text: str) -> str:
    problems: list[Problem] = []
    parse(text, "x.yaml", problems)
    assert len(problems) == 1, problems
    return str(problems[0])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-1.", -1.0),
        ("+2", 2),
        ("1_000_000", 1_000_000),
        ("010", 10),
        ("0x1F", 31),
        (".inf", float("inf")),
        ("true", True),
        ("False", False),
        ("off", "off"),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("~", None),
        ("null", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("'3e-4'", "3e-4"),
        ("!!str 3", "3"),
        ("[1, 2e1, off]", [1, 20.0, "off"]),
        ("[{a: 1}]", [{"a": 1}]),
    ],
)
def test_scalars_are_read_as_written(text: str, value: object) -> None:
    read = value_of(text)
    assert read == value and type(read) is type(value)


def test_every_key_knows_its_line() -> None:
    entry = parse("a: 1\n\nb:\n  c: 2\n  # note\n  d:\n    3\n", "x.yaml", [])
    assert entry is not None
    assert entry.value["a"].place.line == 1
    assert entry.value["b"].place.line == 3
    assert entry.value["b"].value["c"].place.line == 4
    assert str(entry.value["b"].value["d"].place) == "x.yaml:6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "x.yaml:3: a: given twice, first on line 1; keep one"),
        ("s:\n  a: 1\n  a: 3\n", "x.yaml:3: s.a: given twice, first on line 2; keep one"),
        ("s:\n\ta: 1\n", "x.yaml:2: not valid YAML: a tab where YAML allows only spaces; indent with spaces"),
        ("a: &x 1\nb: *x\n", "x.yaml:2: not valid YAML: aliases (*x) are not supported"),
        ("a: 1\nb: [1, 2\n", "x.yaml:3: not valid YAML: expected ',' or ']'"),
        ("a: 1\n  b: 2\n", "x.yaml:2: not valid YAML: mapping values are not allowed here (a colon too many"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2: more than one YAML document"),
        ("a: 1\nb: x\x07\n", "x.yaml:2: the character '\\x07' is not allowed in YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", None),
        ("a: !!python/name:os.system x\n", "x.yaml:1: a: the tag tag:yaml.org,2002:python/name:os.system is not allowed"),
        ("a: !!int x\n", "x.yaml:1: a: 'x' cannot be read as int"),
        ("a: !!bool 3\n", "x.yaml:1: a: '3' cannot be read as bool"),
        ("a: " + "9" * 5000 + "\n", "cannot be read as int"),
        ("[a]: 1\n", "x.yaml:1: a key must be a word, not a list or a mapping"),
        ("a: " + "[" * 2000, "nested deeper than 32 levels"),
        ("a: &x [*x]\n", "aliases (*x) are not supported"),
    ],
)
def test_bad_yaml_is_one_message_with_its_line(text: str, message: str | None) -> None:
    if message is None:  # a tag on a list: the list is plain data, whatever the tag asks for
        entry = parse(text, "x.yaml", [])
        assert entry is not None and entry.value["a"].value == ["ls"]
    else:
        assert message in problem_of(text)


def test_our_rules_do_not_leak_into_the_safe_loader_of_others() -> None:
    assert yaml.safe_load("a: off\nb: 3e-4") == {"a": False, "b": "3e-4"}
