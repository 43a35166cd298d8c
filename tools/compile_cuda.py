"""Compile every .cu file under csrc/ for sm_80 and sm_90a, with warnings as errors, and throw the objects away.

Needs nvcc and any build of torch (for its headers), but no GPU: it shows that the CUDA sources compile, not that they run.
Exit status 0 when all compile or nvcc is not there (said plainly; --require makes that a failure), 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from setup import CSRC, CUDA_ARCHES, BuildError, find_torch, nvcc_command  # noqa: E402 - setup.py is not part of a package


def main() -> int:
    """Compile all sources; one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, metavar="FILE", help="only these (default: every .cu under csrc/)")
    parser.add_argument("--require", action="store_true", help="fail where nvcc is not there")
    arguments = parser.parse_args()
    sources = [path.resolve() for path in arguments.sources] or sorted(CSRC.rglob("*.cu"))
    if missing := [path for path in sources if not path.is_file()]:
        parser.error(f"{missing[0]} is not there")
    if shutil.which("nvcc") is None:
        print(f"compile_cuda: nvcc is not on PATH: {len(sources)} CUDA source(s) NOT compiled")
        return 1 if arguments.require else 0
    try:
        torch = find_torch()
    except BuildError as error:
        print(f"compile_cuda: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        done = pool.map(lambda source: compile_one(source, Path(scratch), torch.include), sources)
        failed = [source for source, compiled in zip(sources, done, strict=True) if not compiled]
    return 1 if failed else 0


def compile_one(source: Path, scratch: Path, torch_include: Path) -> bool:
    """Compile ``source``, say how it went, and whether it did."""
    started = time.monotonic()
    command = [*nvcc_command(source, scratch / f"{source.stem}.o", torch_include), "-Werror", "all-warnings"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    verdict = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
    arches = ", ".join(f"sm_{arch}" for arch in CUDA_ARCHES)
    name = source.relative_to(ROOT) if source.is_relative_to(ROOT) else source
    print(f"compile_cuda: {name} for {arches}: {verdict} in {time.monotonic() - started:.1f} s", flush=True)
    if done.returncode != 0:
        print(done.stdout + done.stderr, file=sys.stderr)
    return done.returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
