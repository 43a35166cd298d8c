"""Compile every .cu file under csrc/ for sm_80 and sm_90a, with warnings as errors, and throw the objects away.

Needs nvcc and any build of torch (for its headers), but no GPU: it shows that the CUDA sources compile, not that they run. What a
GPU would refuse at the launch is found here: a kernel whose registers are more than a multiprocessor has for its block, which has
the threads of __launch_bounds__ or, without them, up to 1024. A kernel that keeps more than a few registers in memory fails too.
Exit status 0 when all compile or nvcc is not there (said plainly; --require makes that a failure), 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from setup import CSRC, CUDA_ARCHES, BuildError, find_torch, nvcc_command  # noqa: E402 - setup.py is not part of a package

REGISTERS = 65536  # of a multiprocessor, on every chip from sm_80 on
GRAIN = 8  # registers are given to a thread in steps of so many
MAX_THREADS = 1024
# Stores and loads of spilled registers that a kernel may have in its code, in bytes.
MAX_SPILL_BYTES = 256


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel on one chip, and the threads that its __launch_bounds__ allow (None: it has none)."""

    name: str
    arch: str
    registers: int
    spill_bytes: int
    threads: int | None

    def why_not(self) -> str | None:
        """Why it cannot be launched, or should not be."""
        threads = self.threads or MAX_THREADS
        if -(-self.registers // GRAIN) * GRAIN * threads > REGISTERS:
            bounds = "without __launch_bounds__ a block may have" if self.threads is None else "its __launch_bounds__ allow"
            return f"{self.name} on {self.arch} uses {self.registers} registers and {bounds} {threads} threads: more than {REGISTERS}"
        if self.spill_bytes > MAX_SPILL_BYTES:
            return f"{self.name} on {self.arch} spills: {self.spill_bytes} bytes of stores and loads, at most {MAX_SPILL_BYTES} may be"
        return None


def main() -> int:
    """Compile all sources; one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, metavar="FILE", help="only these (default: every .cu under csrc/)")
    parser.add_argument("--require", action="store_true", help="fail where nvcc is not there")
    parser.add_argument("--kernels", action="store_true", help="list the registers of every kernel")
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
        done = pool.map(lambda source: compile_one(source, Path(scratch), torch.include, lists=arguments.kernels), sources)
        failed = [source for source, compiled in zip(sources, done, strict=True) if not compiled]
    return 1 if failed else 0


def compile_one(source: Path, scratch: Path, torch_include: Path, *, lists: bool) -> bool:
    """Compile ``source``, say how it went, and whether it did."""
    started = time.monotonic()
    kept = scratch / source.stem
    kept.mkdir()
    # Registers are in ptxas's messages, the threads of a block only in what it reads: nvcc keeps the PTX.
    command = nvcc_command(source, kept / "object.o", torch_include)
    command += ["-Werror", "all-warnings", "-Xptxas", "-v", "--keep", "--keep-dir", str(kept)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    said = done.stdout + done.stderr
    kernels = [] if done.returncode != 0 else read_kernels(said, "\n".join(p.read_text() for p in sorted(kept.glob("*.ptx"))))
    shutil.rmtree(kept)
    wrong = [why for kernel in kernels if (why := kernel.why_not())]
    verdict = f"FAILED ({done.returncode})" if done.returncode != 0 else "FAILED" if wrong else "ok"
    arches = ", ".join(f"sm_{arch}" for arch in CUDA_ARCHES)
    name = source.relative_to(ROOT) if source.is_relative_to(ROOT) else source
    lines = [f"compile_cuda: {name} for {arches}: {verdict} in {time.monotonic() - started:.1f} s{summary(kernels)}"]
    shown = kernels if lists else [kernel for kernel in kernels if kernel.spill_bytes > 0]
    lines += [
        f"  {k.name} on {k.arch}: {k.registers} registers, {k.threads or 'any'} threads, {k.spill_bytes} bytes spilled" for k in shown
    ]
    print("\n".join(lines), flush=True)
    if done.returncode != 0 or wrong:
        print("\n".join(wrong) if wrong else said, file=sys.stderr)
    return done.returncode == 0 and not wrong


def summary(kernels: list[Kernel]) -> str:
    """The kernel with most registers, and how many spill."""
    if not kernels:
        return ""
    most = max(kernels, key=lambda kernel: kernel.registers)
    spilling = sum(kernel.spill_bytes > 0 for kernel in kernels)
    return f"; {len(kernels)} kernels, at most {most.registers} registers ({most.name}), {spilling or 'none'} of them with spills"


def read_kernels(said: str, ptx: str) -> list[Kernel]:
    """The kernels in the messages of ptxas -v, with the bounds that their PTX gives them."""
    threads = {}
    for name, directives in re.findall(r"\.entry\s+([\w$]+)\s*\([^)]*\)([^{]*)\{", ptx):
        if bounds := re.search(r"\.maxntid\s+([\d, ]+)", directives):
            sizes = [int(size) for size in bounds.group(1).split(",")]
            threads[name] = sizes[0] * (sizes[1] if len(sizes) > 1 else 1) * (sizes[2] if len(sizes) > 2 else 1)
    found = []
    for part in said.split("Compiling entry function ")[1:]:
        entry = re.match(r"'([^']+)' for '([^']+)'", part)
        used = re.search(r"Used (\d+) registers", part)
        assert entry is not None and used is not None, part
        # A function that is not inlined has its line among those of the kernels that call it.
        spills = sum(int(stores) + int(loads) for stores, loads in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part))
        found.append((entry.group(1), entry.group(2), int(used.group(1)), spills))
    readable = demangled([name for name, *_ in found])
    return [Kernel(readable[name], arch, registers, spills, threads.get(name)) for name, arch, registers, spills in found]


def demangled(names: list[str]) -> dict[str, str]:
    """Names as they are in the source, as far as there is c++filt."""
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    short = [re.sub(r"\(.*", "", re.sub(r"dist_llm::|\(anonymous namespace\)::|^void ", "", line)) for line in lines]
    return dict(zip(names, short, strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
