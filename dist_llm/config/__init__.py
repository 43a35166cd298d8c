"""The resolved description of a run: schema, YAML with ``extends``, overrides, rules across sections. Never torch."""
