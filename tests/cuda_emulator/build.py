"""Compile CUDA sources for the CPU, with the emulator of this folder in place of CUDA's headers.

    python -m tests.cuda_emulator.build [csrc/<op>/<op>_cuda.cu ...]

prints the path of a library that registers the ops of those files (default: of all .cu files) for CPU tensors. Objects are kept in a
directory of the user's own below the temporary one, under the hash of everything they were made from: only what changed is compiled again.
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["EmulatorError", "build", "translate", "why_not"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
RUNTIME = ("runtime.cpp", "fiber.cpp", "shared_memory.cpp", "global_memory.cpp", "sanitizer.cpp")
TARGET_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"
FLAGS = ["-O1", "-g1", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# Loads and stores call sanitizer.cpp; a variable without a value gets bits that spoil what is computed from it; fused
# multiply-adds as nvcc makes them need instructions that not every processor has, so there are none.
KERNEL_FLAGS = [
    TARGET_TORCH,
    *("-x", "c++", "-DDL_EMULATE_CUDA", "-ffp-contract=off", "-ftrivial-auto-var-init=pattern"),
    *("-fsanitize=thread", "-fsanitize=alignment,bounds", "-Wno-tsan", "-Wno-unused-function", "-Wno-attributes"),
]

# __shared__ T name[3][4], other[5];
SHARED = re.compile(
    r"__shared__\s+((?:(?:__align__|alignas)\s*\([^)]*\)\s*)?)([\w:<>,\s]*?[\w>])\s+(\w+\s*(?:\[[^\]]*\]\s*)*(?:,\s*\w+\s*(?:\[[^\]]*\]\s*)*)*);"
)
DECLARATOR = re.compile(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)")


class EmulatorError(Exception):
    """The sources do not compile for the emulator; the text is the compiler's."""


def why_not() -> str | None:
    """Why nothing can be built here, or None."""
    return None if shutil.which("g++") else "there is no g++"


def translate(source: str) -> str:
    """Declarations of static shared memory become references to the emulator's; lines stay where they are."""

    def declare(match: re.Match[str]) -> str:
        alignment, kind, declarators = match.groups()
        amount = re.sub(r"^\w+\s*\(|\)\s*$", "", alignment)
        parts = []
        for name, dims in DECLARATOR.findall(declarators):
            sized = kind + re.sub(r"\[([^\]]*)\]", r"[(\1)]", dims)
            own = "[] { static char tag; return &tag; }()"
            parts.append(f"auto& {name} = ::cuda_emulator::shared<{sized}>({own}{', ' + amount if amount else ''});")
        return " ".join(parts)

    lines = source.split("\n")
    # A macro's text, and shared memory whose size is given at the launch, are not declarations of a kernel.
    return "\n".join(line if line.lstrip().startswith("#") or "extern __shared__" in line else SHARED.sub(declare, line) for line in lines)


def _torch_home() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise EmulatorError("torch is not installed")
    return Path(spec.origin).parent


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise EmulatorError(f"{' '.join(command[:1])} failed\n{done.stderr or done.stdout}")


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]


def _place(path: Path, data: str) -> None:
    """Write a file whole: another process may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(data, encoding="utf-8")
    fresh.replace(path)


def _compile(source: Path, obj: Path, flags: list[str]) -> Path:
    if not obj.is_file():
        obj.parent.mkdir(parents=True, exist_ok=True)
        fresh = obj.with_name(f".{obj.stem}.{os.getpid()}.o")
        _run(["g++", *FLAGS, *flags, "-c", str(source), "-o", str(fresh)])
        fresh.replace(obj)
    return obj


def build(sources: Iterable[Path] = (), *, changes: Mapping[str, tuple[str, str]] | None = None, jobs: int | None = None) -> Path:
    """A library with the ops of CUDA sources for CPU tensors.

    Args:
        sources: .cu files, below csrc/ or elsewhere; none: all below csrc/.
        changes: file, relative to csrc/ -> text in it and what to put in its place: a kernel with a fault, to see that it is found.
        jobs: compilers at once.

    Raises:
        EmulatorError: a source does not compile, or a change fits nothing.
    """
    torch = _torch_home()
    texts = {p.relative_to(CSRC): p.read_text(encoding="utf-8") for suffix in ("*.cu", "*.cuh", "*.h") for p in sorted(CSRC.rglob(suffix))}
    chosen = []
    for source in [Path(s).resolve() for s in sources] or sorted(CSRC.rglob("*.cu")):
        relative = source.relative_to(CSRC) if source.is_relative_to(CSRC) else Path("elsewhere") / source.name
        texts[relative] = source.read_text(encoding="utf-8")
        chosen.append(relative)
    for name, (old, new) in (changes or {}).items():
        if texts[Path(name)].count(old) != 1:
            raise EmulatorError(f"{old!r} is {texts[Path(name)].count(old)} times in {name}, not once")
        texts[Path(name)] = texts[Path(name)].replace(old, new)
    emulator = {
        p.relative_to(HERE): p.read_text(encoding="utf-8")
        for p in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h"), *HERE.glob("include/*")])
    }
    everything = _digest([str(torch), *FLAGS, *KERNEL_FLAGS, *(f"{path}\0{text}" for path, text in emulator.items())])
    headers = {path: text for path, text in texts.items() if path.suffix != ".cu"}
    base = Path(tempfile.gettempdir()) / f"dist_llm-cuda-emulator-{getpass.getuser()}"
    tree = base / "src" / _digest([everything, *(f"{path}\0{text}" for path, text in texts.items())])
    for path, text in texts.items():
        if not (tree / path).is_file():
            _place(tree / path, f'#line 1 "csrc/{path}"\n{translate(text)}')

    work = []
    for relative in chosen:
        used = [f"{path}\0{headers[path]}" for path in _included(relative, texts)]
        obj = base / "obj" / _digest([everything, *used, f"{relative}\0{texts[relative]}"]) / f"{relative.stem}.o"
        work.append((tree / relative, obj, [*KERNEL_FLAGS, f"-I{HERE / 'include'}", f"-I{tree}", "-isystem", str(torch / "include")]))
    for name in RUNTIME:
        work.append(
            (HERE / name, base / "obj" / everything / f"{Path(name).stem}.o", [f"-I{HERE / 'include'}", "-isystem", str(torch / "include")])
        )
    # The package asks a library which instructions its CPU kernels use before it calls any op.
    isa = CSRC / "common/isa.cpp"
    isa_digest = _digest([everything, isa.read_text(encoding="utf-8"), texts[Path("common/isa.h")]])
    work.append((isa, base / "obj" / isa_digest / "isa.o", [TARGET_TORCH, f"-I{CSRC}", "-isystem", str(torch / "include")]))
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        objects = list(pool.map(lambda w: _compile(*w), work))

    # The runtime first: of inline functions that both have, the linker then keeps those that are not instrumented.
    objects = objects[len(chosen) :] + objects[: len(chosen)]
    library = base / "lib" / f"{_digest(map(str, objects))}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        fresh = library.with_name(f".{library.name}.{os.getpid()}")
        _run(
            ["g++", "-shared", *map(str, objects), f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-Wl,-z,defs", "-lc10", "-o", str(fresh)]
        )
        fresh.replace(library)
    return library


def _included(source: Path, texts: Mapping[Path, str]) -> list[Path]:
    """The headers below csrc/ that a file includes, and those that they include."""
    found: dict[Path, None] = {}
    todo = [source]
    while todo:
        for name in re.findall(r'^\s*#include "([^"]+)"', texts[todo.pop()], re.MULTILINE):
            path = Path(name)
            if path in texts and path not in found:
                found[path] = None
                todo.append(path)
    return sorted(found)


def main() -> None:
    """Print the path of the library."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, metavar="FILE", help="only these (default: every .cu under csrc/)")
    arguments = parser.parse_args()
    try:
        print(build(arguments.sources))
    except EmulatorError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
