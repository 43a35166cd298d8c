"""Config files to one tree: each file over those it extends, the command line over all.

Nothing here knows the schema; every value keeps the file and line it came from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from dist_llm.config.problems import COMMAND_LINE, Place, Problem
from dist_llm.config.syntax import Entry, Tree, parse

__all__ = ["Source", "apply_overrides", "merge", "parse_override", "read_source"]


@dataclass
class Source:
    """What the files say together.

    ``complete`` is false when a file could not be read: a key may then be missing only because its file is.
    """

    tree: Tree = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    complete: bool = True


class _Refused(Exception):
    """A file or an override that says nothing we can use."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems


def merge(under: Tree, over: Tree) -> Tree:
    """Mappings are merged key by key; anything else in ``over`` replaces what is in ``under``.

    A key without a value says nothing about a mapping, so that a section whose lines are all commented out changes nothing.
    """
    merged = dict(under)
    for name, new in over.items():
        old = under.get(name)
        if old is not None and isinstance(old.value, dict) and isinstance(new.value, dict):
            merged[name] = Entry(merge(old.value, new.value), new.place)
        elif old is not None and isinstance(old.value, dict) and new.value is None:
            continue
        else:
            merged[name] = new
    return merged


def read_source(path: str | Path) -> Source:
    """Read ``path`` and everything it extends; what is wrong is in the result's ``problems``."""
    source = Source()
    source.tree = _read(Path(path), (), Place(""), source, {})
    return source


def _read(path: Path, chain: tuple[Path, ...], said_at: Place, source: Source, done: dict[str, Tree]) -> Tree:
    if "\0" in str(path):  # no system call takes it, so that the rest need not expect it
        source.problems.append(Problem(said_at.file, said_at.line, "", f"{str(path)!r} cannot be the name of a file"))
        source.complete = False
        return {}
    path = _tidy(path)
    identity = os.path.realpath(path)
    if identity in map(os.path.realpath, chain):
        names = " -> ".join(str(p) for p in (*chain, path))
        source.problems.append(Problem(said_at.file, said_at.line, "extends", f"the files extend each other in a circle: {names}"))
        source.complete = False
        return {}
    if identity in done:  # two bases may share a base; it is read, and its problems are reported, once
        return done[identity]
    try:
        own = _read_file(path, said_at, source.problems)
    except _Refused as refused:
        source.problems.extend(refused.problems)
        source.complete = False
        done[identity] = {}
        return {}
    source.files.append(path)
    under: Tree = {}
    for name, place in _bases(own, source):
        under = merge(under, _read(path.parent / name, (*chain, path), place, source, done))
    done[identity] = merge(under, {key: entry for key, entry in own.items() if key != "extends"})
    return done[identity]


def _tidy(path: Path) -> Path:
    # `configs/big/../tiny/a.yaml` reads better as `configs/tiny/a.yaml`, unless a symbolic link makes that another file.
    tidy = Path(os.path.normpath(path))
    return tidy if os.path.realpath(tidy) == os.path.realpath(path) else path


def _read_file(path: Path, said_at: Place, problems: list[Problem]) -> Tree:
    because = f" (extended by {said_at})" if said_at.file else ""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        message, nearest = _missing(path)
        raise _Refused(Problem(str(path), None, "", message + because, nearest)) from None
    except IsADirectoryError:
        raise _Refused(Problem(str(path), None, "", f"is a directory; name a file in it{because}")) from None
    except OSError as error:
        raise _Refused(Problem(str(path), None, "", f"cannot be read: {error.strerror}{because}")) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise _Refused(Problem(str(path), line, "", message)) from None
    own: list[Problem] = []
    entry = parse(text, str(path), own)
    if entry is not None and isinstance(entry.value, dict):
        problems.extend(own)
        return entry.value
    if own:
        raise _Refused(*own)
    if entry is None or entry.value is None:
        raise _Refused(Problem(str(path), None, "", f"the file is empty; a config is a mapping of keys to values{because}"))
    kind = "a list" if isinstance(entry.value, list) else "a single value"
    message = f"holds {kind}; a config is a mapping of keys to values, such as `seed: 1`"
    raise _Refused(Problem(str(path), entry.place.line, "", message))


def _missing(path: Path) -> tuple[str, str | None]:
    folder = path.parent
    if not folder.is_dir():
        return f"no such file; there is no directory {folder}", None
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    near = get_close_matches(path.name, names, n=1) or get_close_matches(path.stem, [Path(n).stem for n in names], n=1)
    if near:
        name = near[0] if near[0] in names else next(n for n in names if Path(n).stem == near[0])
        return "no such file", str(folder / name)
    return "no such file" + (f"; {folder} has {', '.join(names[:8])}" if names else f"; there is no .yaml file in {folder}"), None


def _bases(own: Tree, source: Source) -> list[tuple[str, Place]]:
    if "extends" not in own:
        return []
    entry = own["extends"]
    names = entry.value if isinstance(entry.value, list) else [entry.value]
    if not names or not all(isinstance(name, str) and name for name in names):
        message = "must be a file name or a list of them, relative to this file"
        source.problems.append(Problem(entry.place.file, entry.place.line, "extends", message))
        source.complete = False
        return []
    return [(name, entry.place) for name in names]


def parse_override(text: str, problems: list[Problem]) -> tuple[str, Entry] | None:
    """Split ``a.b=c`` into its dotted key and its value, read as YAML; ``None`` when it is refused."""
    try:
        return _override(text)
    except _Refused as refused:
        problems.extend(refused.problems)
        return None


def _override(text: str) -> tuple[str, Entry]:
    place = COMMAND_LINE.file
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*", key):
        fault = f"{key!r} is not a key" if equals else "it has no '='"
        raise _Refused(Problem(place, None, "", f"{text!r} is not an override: {fault}; write key=value, such as optim.lr=3e-4"))
    if key == "extends" or key.startswith("extends."):
        message = "cannot be overridden: it decides which files are read; extend them in a config file"
        raise _Refused(Problem(place, None, key, message))
    own: list[Problem] = []
    entry = parse(value, place, own, lines=False)
    if own:
        # The parser does not know the key that the value is for.
        raise _Refused(*(replace(p, key=f"{key}.{p.key}" if p.key else key) for p in own))
    if entry is None:
        raise _Refused(Problem(place, None, key, f"no value after '='; write {key}=null for none"))
    return key, entry


def _nested(key: str, entry: Entry) -> Tree:
    """The tree in which only the dotted ``key`` stands."""
    *sections, name = key.split(".")
    tree: Tree = {name: entry}
    for section in reversed(sections):
        tree = {section: Entry(tree, entry.place)}
    return tree


def apply_overrides(tree: Tree, overrides: Sequence[tuple[str, Entry]]) -> Tree:
    """The overrides over ``tree``, the later the stronger."""
    for key, entry in overrides:
        tree = merge(tree, _nested(key, entry))
    return tree
