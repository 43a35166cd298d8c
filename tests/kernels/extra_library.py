"""pytest plugin (-p tests.kernels.extra_library): loads the library that DL_EXTRA_LIBRARY names, before tests are collected.

For an op whose device code is not in the installed extension: one under construction, or CUDA sources compiled for the emulator.
"""

from __future__ import annotations

import os

import torch

from dist_llm.kernels import table  # noqa: F401  the schemas must exist first

if path := os.environ.get("DL_EXTRA_LIBRARY"):
    torch.ops.load_library(path)
