from __future__ import annotations

import re

from dist_llm.config.describe import config_markdown, json_schema
from dist_llm.config.keys import KEYS
from dist_llm.config.rules import RULES

from .configs import ROOT


def test_the_page_in_docs_is_the_one_the_schema_describes() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == config_markdown(), "run tools/write_config_docs.py"


def test_the_page_has_one_row_a_key_and_every_rule() -> None:
    page = config_markdown()
    assert re.findall(r"^\| `([a-z0-9_.]+)` \|", page, re.MULTILINE) == list(KEYS)
    assert page.count("\n- ") == 3 + len(RULES)
    assert "| whole number >= 0, < 2^63 | `1234` |" in page


def test_every_key_has_a_description() -> None:
    assert [key for key, field in KEYS.items() if not field.description] == []


def test_the_json_schema_knows_every_key_and_extends_and_forbids_others() -> None:
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema") and schema["additionalProperties"] is False
    assert "extends" in schema["properties"] and "extends" not in schema["required"]
    model = schema["$defs"]["ModelConfig"]
    assert model["additionalProperties"] is False and model["properties"]["vocab_size"]["minimum"] == 2
    named = {name for name in schema["properties"]} | {name for part in schema["$defs"].values() for name in part["properties"]}
    assert {key.rpartition(".")[2] for key in KEYS} <= named
