"""The schema for people (docs/config.md) and for editors (JSON schema)."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic.fields import FieldInfo

from dist_llm.config.keys import choices, kind, section_class
from dist_llm.config.rules import RULES
from dist_llm.config.schema import RunConfig
from dist_llm.config.write import scalar

__all__ = ["config_markdown", "json_schema"]

_HEAD = """\
# The config

<!-- Written by tools/write_config_docs.py from dist_llm/config: change the schema, not this file. -->

A run is described by one YAML file. Every key is listed here; an unknown key is an error that names the nearest one.

```
dist-llm config show CONFIG [a.b=c ...]       every value and where it came from, as YAML that loads again
dist-llm config validate CONFIG [a.b=c ...]   every problem, with file and line; exit code 2 if there is one
dist-llm config schema                        the JSON schema, for editors
```

- `extends: base.yaml`, or a list of files, puts this file over others, named relative to the file that says it. Sections are merged key by key;
  the later file wins, the file itself is last.
- `a.b=c` on the command line wins over every file; the value is read as YAML (`optim.lr=3e-4`, `data.path=null`).
- Only `true` and `false` are booleans: `log.wandb: off` is the word off. `3e-4` is a number. Keys given twice, aliases and tags are refused.
"""


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config file that extends nothing, or of a resolved one."""
    schema = RunConfig.model_json_schema()
    file_name = {"type": "string", "minLength": 1}
    schema["properties"] = {
        "extends": {
            "description": "File, or files, that this one is put over; relative to this file.",
            "anyOf": [file_name, {"type": "array", "items": file_name, "minItems": 1}],
        },
        **schema["properties"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def config_markdown() -> str:
    """The text of docs/config.md."""
    top = {name: field for name, field in RunConfig.model_fields.items() if section_class(field) is None}
    parts = [_HEAD, "## Top level\n", _table(top, "")]
    for name, field in RunConfig.model_fields.items():
        section = section_class(field)
        if section is not None:
            parts += [f"## {name}\n", f"{_summary(section)}\n", _table(section.model_fields, f"{name}.")]
    rules = "".join(f"- {_summary(rule.broken_by)}\n" for rule in RULES)
    parts += ["## Rules across keys\n", f"All are checked, and everything that breaks one is reported together.\n\n{rules}"]
    return "\n".join(parts)


def _summary(thing: Any) -> str:
    text = inspect.getdoc(thing)
    assert text, thing
    return text


def _table(fields: dict[str, FieldInfo], prefix: str) -> str:
    rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        cells = (f"`{prefix}{name}`", _values(field), _default(field), (field.description or "").replace("<", "&lt;"))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _values(field: FieldInfo) -> str:
    if options := choices(field):
        return ", ".join(f"`{option}`" for option in options)
    limits = []
    for rule in field.metadata:
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            limit = getattr(rule, attribute, None)
            if limit is not None:
                limits.append(f"{sign} {_power(limit)}")
        if pattern := getattr(rule, "pattern", None):
            limits.append(f"`{pattern}`")
    return kind(field).removeprefix("a ") + (" " + ", ".join(limits) if limits else "")


def _power(limit: float) -> str:
    exponent = int(limit).bit_length() - 1
    if limit == 1 << max(exponent, 0) and exponent >= 20:
        return f"2^{exponent}"
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{scalar(field.get_default())}`"
