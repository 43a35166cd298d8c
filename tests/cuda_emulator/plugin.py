"""pytest plugin (-p tests.cuda_emulator.plugin): the emulated CUDA kernels are the extension of the process, under every test.

DL_EMULATED_SOURCES names .cu files, with spaces between them; without it, all of csrc/ are taken.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tests.cuda_emulator.__main__ import use_library
from tests.cuda_emulator.build import build

use_library(build(map(Path, os.environ.get("DL_EMULATED_SOURCES", "").split())), Path(tempfile.mkdtemp(prefix="dist_llm-emulated-")))
