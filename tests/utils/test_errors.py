from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from dist_llm.utils import errors
from dist_llm.utils.errors import ExitCode, UserError

TABLE = Path(__file__).parents[2] / "docs" / "exit-codes.md"
KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, UserError)]


def test_every_code_has_one_name_and_is_a_status_a_process_can_have() -> None:
    codes = [member.value for member in ExitCode.__members__.values()]
    assert len(set(codes)) == len(codes) == len(ExitCode.__members__)
    assert all(0 <= code < 256 for code in codes)


def test_the_documented_table_is_the_enum() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+?) \| (.+?) \|$", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [(int(code), name) for code, name, _, _ in rows] == [(member.value, member.name) for member in ExitCode]
    assert all(what.strip() and do.strip() for _, _, what, do in rows)


def test_the_codes_are_those_promised() -> None:
    promised = {0, 1, 2, 65, 66, 70, 71, 72, 73, 74, 75, 76, 77, 78, 130}
    assert {int(code) for code in ExitCode} == promised


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_a_person_can_act_on_has_a_code_and_is_a_value_error(kind: type[UserError]) -> None:
    error = kind("file x is empty")
    assert isinstance(error, ValueError)
    assert str(error) == "file x is empty"
    assert error.exit_code in ExitCode
    assert error.exit_code != ExitCode.DONE
    assert not error.is_echo
    assert kind.__name__ in errors.__all__
