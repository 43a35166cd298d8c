from __future__ import annotations

from pathlib import Path

import pytest

from .configs import SMALLEST, write


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    return write(tmp_path, "smallest.yaml", SMALLEST)
