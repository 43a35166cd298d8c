"""From a config file and overrides to one validated config, or to every reason why not.

Three passes share one list of problems: reading (source.py), keys and values against the schema (here and in values.py), and the rules
across sections (rules.py). The later passes go on with whatever the earlier ones could understand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dist_llm.config.keys import KEYS
from dist_llm.config.problems import COMMAND_LINE, ConfigErrors, Place, Problem
from dist_llm.config.rules import RANK_KEYS, broken_rules, problems_for_ranks
from dist_llm.config.schema import RunConfig
from dist_llm.config.source import apply_overrides, parse_override, read_source
from dist_llm.config.syntax import Tree
from dist_llm.config.values import bad_keys, check_tree, understood, unknown_override, validate
from dist_llm.config.write import config_hash, diff_configs, dump_yaml

__all__ = ["ConfigErrors", "Problem", "Resolved", "config_hash", "diff_configs", "dump_yaml", "load_config"]


@dataclass(frozen=True)
class Resolved:
    """A valid config and how it came about.

    ``origins``: each dotted key to ``"configs/a.yaml:12"``, ``"command line"`` or ``"default"``.
    ``files``: every file read, the named one first.
    """

    config: RunConfig
    origins: dict[str, str]
    files: tuple[Path, ...]


def load_config(path: str | Path, overrides: Sequence[str] = (), *, ranks: int | None = None) -> Resolved:
    """Read a config file, what it extends, and ``a.b=c`` overrides.

    Args:
        path: the YAML file.
        overrides: ``a.b=c`` each, the value read as YAML; the later wins.
        ranks: check as well that the config fits this many ranks.

    Raises:
        ConfigErrors: with every problem found.
    """
    source = read_source(path)
    problems = list(source.problems)
    checked = check_tree(_with_overrides(source.tree, overrides, problems), problems)
    config = validate(checked, str(path), problems, missing_is_known=source.complete)
    if source.complete:
        bad = bad_keys(problems)
        problems += _rule_problems(config or understood(checked, bad), bad, ranks, checked.places)
    if config is None or problems:
        raise ConfigErrors(_in_order(problems, source.files))
    origins = {key: str(checked.places.get(key, "default")) for key in KEYS}
    return Resolved(config, origins, tuple(source.files))


def _with_overrides(tree: Tree, overrides: Sequence[str], problems: list[Problem]) -> Tree:
    accepted = []
    for text in overrides:
        parsed = parse_override(text, problems)
        if parsed is None:
            continue
        # Looked at before the merge: `optm.lr=1` would otherwise be reported as a section that nobody wrote.
        if unknown := unknown_override(parsed[0]):
            problems.append(unknown)
        else:
            accepted.append(parsed)
    return apply_overrides(tree, accepted)


def _rule_problems(config: RunConfig, bad: set[str], ranks: int | None, places: Mapping[str, Place]) -> list[Problem]:
    problems = []
    for rule, message in broken_rules(config, bad):
        # A rule is broken by the values together: when its first key has its default, the line of another one is shown.
        place = next((places[key] for key in rule.keys if key in places), Place(""))
        problems.append(Problem(place.file, place.line, rule.keys[0], message))
    if ranks is not None and bad.isdisjoint(RANK_KEYS):
        said = {problem.key for problem in problems}
        for problem in problems_for_ranks(config, ranks):
            if problem.key not in said:  # parallel.dp and the ranks can make the same complaint about the batch
                place = places.get(problem.key, Place(""))
                problems.append(replace(problem, file=place.file, line=place.line))
    return problems


def _in_order(problems: list[Problem], files: list[Path]) -> list[Problem]:
    order = {str(file): i for i, file in enumerate(files)}
    order[COMMAND_LINE.file] = len(files) + 1
    return sorted(dict.fromkeys(problems), key=lambda p: (order.get(p.file, len(files)), p.line or 0))
