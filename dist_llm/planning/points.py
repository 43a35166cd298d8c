"""Finished runs from a table: columns ``params``, ``tokens``, ``loss``, and ``active`` for mixtures of experts."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from dist_llm.planning.law_forms import Points
from dist_llm.utils.errors import ConfigError, DataError, StorageError

__all__ = ["COLUMNS", "join_points", "make_points", "read_points"]

COLUMNS = ("params", "tokens", "loss")


def read_points(path: Path) -> Points:
    """The points of a CSV file with a header; other columns are left alone, empty lines and lines that begin with # skipped.

    Raises:
        ConfigError: a column is missing, or there is no row.
        DataError: a value is no positive number, or not one of a law's; the line is named.
        StorageError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text ({error.reason} at byte {error.start}); plan fit reads CSV files and run directories"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}; check that it is a file this user may read") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip() and not line.lstrip().startswith("#")]
    if not numbered:
        raise ConfigError(f"{path} is empty; it needs a header with {', '.join(COLUMNS)} and a line for each run")
    rows = list(csv.reader(line for _, line in numbered))
    header = [name.strip() for name in rows[0]]
    for column in COLUMNS:
        if column not in header:
            near = get_close_matches(column, header, n=1)
            hint = f"; is it called '{near[0]}' here?" if near else ""
            raise ConfigError(f"{path}, line {numbered[0][0]}: there is no column '{column}' among {', '.join(header)}{hint}")
        if header.count(column) > 1:
            raise ConfigError(f"{path}, line {numbered[0][0]}: the column '{column}' stands there twice; keep one")
    found = []
    for (number, _), row in zip(numbered[1:], rows[1:], strict=True):
        where = f"{path}, line {number}"
        if len(row) != len(header):
            raise DataError(f"{where}: {len(row)} values, but the header names {len(header)} columns; fill in or remove the line")
        found.append((where, dict(zip(header, row, strict=True))))
    if not found:
        raise ConfigError(f"{path} has a header and no runs; add a line for each run")
    return make_points(found)


def make_points(rows: Iterable[tuple[str, Mapping[str, str | float]]]) -> Points:
    """Points from (where it stands, values by column).

    Raises:
        DataError: a value is no positive number, or ``active`` is more than ``params``.
    """
    where: list[str] = []
    values: list[Sequence[float]] = []
    for place, row in rows:
        params, tokens, loss = (_positive(row[name], name, place) for name in COLUMNS)
        given = row.get("active", "")
        active = params if isinstance(given, str) and not given.strip() else _positive(given, "active", place)
        if active > params:
            raise DataError(
                f"{place}: active is {active:g} and params {params:g}; a token cannot meet more parameters than there are: params counts all"
            )
        where.append(place)
        values.append((params, tokens, loss, active))
    columns = np.array(values, dtype=np.float64).reshape(-1, 4).T
    return Points(columns[0], columns[1], columns[2], columns[3], tuple(where))


def join_points(parts: Sequence[Points]) -> Points:
    """All points of several sets."""
    joined = [np.concatenate([getattr(p, name) for p in parts]) for name in ("params", "tokens", "loss", "active")]
    return Points(joined[0], joined[1], joined[2], joined[3], tuple(s for p in parts for s in p.sources))


def _positive(value: str | float, name: str, place: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise DataError(f"{place}: {name} is {value!r}, not a number; correct or remove the line") from None
    if not math.isfinite(number) or number <= 0:
        raise DataError(f"{place}: {name} is {value}; it must be a positive number; correct or remove the line")
    return number
