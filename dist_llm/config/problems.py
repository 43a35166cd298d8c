"""What is wrong with a config, and where: one line a problem, all of them in one error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_llm.utils.errors import ConfigError

__all__ = ["COMMAND_LINE", "ConfigErrors", "Place", "Problem"]


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of a file, or the command line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


COMMAND_LINE = Place("command line")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config.

    ``file`` is empty where no file is at fault, ``key`` where no key is. ``nearest`` is what was probably meant: a key, a value or a file.
    """

    file: str
    line: int | None
    key: str
    message: str
    nearest: str | None = None

    def __str__(self) -> str:
        place = str(Place(self.file, self.line)) if self.file else ""
        hint = f"; did you mean {self.nearest}?" if self.nearest else ""
        return ": ".join(part for part in (place, self.key, self.message) if part) + hint


class ConfigErrors(ConfigError):
    """A config cannot be used; ``problems`` holds every reason, in the order of files and lines."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems]
        # With a heading, each of several problems starts a line with its file, whatever the command puts before the message.
        heading = [f"the config has {len(lines)} problems"] if len(lines) > 1 else []
        super().__init__("\n".join(heading + lines))
