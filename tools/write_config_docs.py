"""Write docs/config.md from the schema: `.venv/bin/python tools/write_config_docs.py`."""

from pathlib import Path

from dist_llm.config.describe import config_markdown
from dist_llm.utils.files import write_atomic

if __name__ == "__main__":
    target = Path(__file__).resolve().parent.parent / "docs" / "config.md"
    write_atomic(target, config_markdown())
    print(f"wrote {target}")
