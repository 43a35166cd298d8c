"""``python -m dist_llm`` is the command ``dist-llm``."""

from dist_llm.cli.main import entry

if __name__ == "__main__":
    entry()
