"""What many tests stand on: a small real corpus, and the commands of this environment as a person runs them."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
Run = Callable[..., subprocess.CompletedProcess[str]]


# With several workers, what runs longest in one piece starts first: begun last, it would leave the others idle.
FIRST = ("slurm", "tools", "verify")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders of ``FIRST`` in their order, then the rest as it was."""
    tests = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(tests).parts[0]
        return FIRST.index(folder) if folder in FIRST else len(FIRST)

    items.sort(key=place)


def clean_environment() -> dict[str, str]:
    """This environment with its own programs first, and nothing that a launcher of the test run itself may have left."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SLURM_", "TORCHELASTIC_")) and k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return {**kept, "PATH": f"{BIN}{os.pathsep}{kept.get('PATH', '')}", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def dist_llm() -> Run:
    """Runs ``dist-llm`` with the words given; the answer has returncode, stdout and stderr."""

    def run(*words: object, cwd: Path = ROOT, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dist_llm", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=clean_environment(), timeout=timeout, check=False)

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, dist_llm: Run) -> Path:
    """About 0.4 MB of this Python's own library, prepared with 512 tokens: what configs/tiny/*.yaml can train on."""
    directory = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_path("stdlib"))
    sources = [str(library / name) for name in ("argparse.py", "ast.py", "json", "email")]
    done = dist_llm("data", "prepare", "--source", *sources, "--out", directory / "data", "--vocab-size", 512, "--val-fraction", 0.1)
    assert done.returncode == 0, done.stderr
    return directory / "data"
