"""Build of the compiled extension, dist_llm/_C.so; everything else about the package is in pyproject.toml.

DIST_LLM_BUILD=auto (the default) builds when a C++ compiler and torch's headers are there, and otherwise installs the PyTorch
reference path and prints why; 0 never builds; 1 fails when it cannot. The CUDA kernels go in where torch is a CUDA build and nvcc is
there; when they fail to build, auto keeps the CPU kernels and the reason, and 1 fails. What happened is written to
dist_llm/_build_info.json, which `dist-llm doctor` reads. CXX names the compiler, MAX_JOBS how many run at once.

The extension has no Python module in it: it registers device code for ops whose schemas are declared in Python, through torch's
stable ABI, and is loaded with torch.ops.load_library. So it is compiled here directly, without Python's own headers.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
LIBRARY = "_C.so"
BUILD_INFO = "_build_info.json"
# The oldest torch whose stable ABI the code may use; the library then loads in that release and every later one.
TARGET_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# GCC's own AVX-512 headers warn about their deliberately undefined registers.
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", TARGET_TORCH]
NVCC_FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", TARGET_TORCH, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# What is compiled to machine code: GPUs of compute capability 8.x run the first, 9.0 the second. Later ones compile PTX when they load it,
# that of the first: it costs no compilation here, and the sources use nothing that only later chips have.
CUDA_ARCHES = ("80", "90a")
PTX_ARCH = "80"


class BuildError(Exception):
    """The extension cannot be built; the text says why."""


@dataclass(frozen=True)
class Torch:
    """What the build needs to know of the installed torch."""

    version: str
    cuda: str | None
    include: Path
    lib: Path


def find_torch() -> Torch:
    """The torch of this environment."""
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            f"torch cannot be imported here ({error}); install torch first and then this package with --no-build-isolation"
        ) from error
    home = Path(torch.__file__).parent
    if not (home / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(f"torch {torch.__version__} has no stable ABI headers; torch 2.11 or newer has")
    return Torch(torch.__version__, torch.version.cuda, home / "include", home / "lib")


def find_compiler() -> list[str]:
    """The C++ compiler as the beginning of a command."""
    requested = os.environ.get("CXX", "")
    if requested:
        command = shlex.split(requested)
        if shutil.which(command[0]) is None:
            raise BuildError(f"the C++ compiler CXX={requested} is not there; install it, or unset CXX")
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildError("there is no C++ compiler (looked for g++, clang++ and c++); install one, for example Debian's g++")


def nvcc_command(source: Path, obj: Path, torch_include: Path, cxx: list[str] | None = None) -> list[str]:
    """The command that compiles one CUDA source; it needs no CUDA headers from torch, so a CPU build of torch will do."""
    codes = []
    for arch in CUDA_ARCHES:
        code = f"[sm_{arch},compute_{arch}]" if arch == PTX_ARCH else f"sm_{arch}"
        codes += ["-gencode", f"arch=compute_{arch},code={code}"]
    return [
        "nvcc",
        *NVCC_FLAGS,
        *codes,
        *host_compiler(cxx),
        f"-I{CSRC}",
        "-isystem",
        str(torch_include),
        "-c",
        str(source),
        "-o",
        str(obj),
    ]


def host_compiler(cxx: list[str] | None) -> list[str]:
    """nvcc's option for the C++ compiler behind it; none where nvcc finds its own, or is told one by NVCC_CCBIN."""
    if cxx is None or cxx == ["g++"] or len(cxx) != 1 or os.environ.get("NVCC_CCBIN"):
        return []
    return ["-ccbin", cxx[0]]


def why_no_cuda(torch: Torch) -> str | None:
    """Why the CUDA kernels are left out, or None."""
    if torch.cuda is None:
        return f"torch {torch.version} is a CPU build"
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH; install the CUDA toolkit to build the CUDA kernels"
    release, major = nvcc_release(), torch.cuda.split(".")[0]
    if release is None:
        return "nvcc --version does not say which release of CUDA it is of"
    # Two runtimes of different majors in one process know nothing of each other's kernels.
    if release.split(".")[0] != major:
        return f"nvcc is of CUDA {release} and torch {torch.version} of CUDA {torch.cuda}; put an nvcc of CUDA {major} first on PATH"
    return None


def nvcc_release() -> str | None:
    """The release of CUDA that nvcc is of, such as 13.0."""
    try:
        said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, errors="replace", check=False).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+\.\d+)", said)
    return found.group(1) if found else None


def execute(command: list[str]) -> None:
    """Run a compiler; its output is the reason when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        # collect2 says only that the linker failed; the linker's own line is before it.
        errors = (line for line in lines if "error" in line and not line.startswith("collect2"))
        first = next(errors, lines[0] if lines else "no output")
        print("\n".join(lines), file=sys.stderr)
        raise BuildError(f"{shlex.join(command[:1])} failed with status {done.returncode}: {first}")


def wait_for(jobs: list[Future[None]]) -> None:
    """Raise the first failure; those that have not begun then never do."""
    try:
        for job in jobs:
            job.result()
    finally:
        for job in jobs:
            job.cancel()


def build(library: Path, scratch: Path, *, insists: bool) -> dict[str, object]:
    """Compile all sources into ``library``; returns what doctor should know.

    CUDA kernels that do not compile or link are left out, and the CPU kernels kept, unless the caller ``insists``.
    """
    started = time.monotonic()
    torch = find_torch()
    cxx = find_compiler()
    no_cuda = why_no_cuda(torch)
    scratch.mkdir(parents=True, exist_ok=True)
    objects = {source: scratch / f"{source.stem}.o" for suffix in ("*.cpp", "*.cu") for source in sorted(CSRC.rglob(suffix))}
    on_cpu = [str(obj) for source, obj in objects.items() if source.suffix == ".cpp"]
    # Linked under another name and moved: a process that has the old library loaded keeps its file.
    library.parent.mkdir(parents=True, exist_ok=True)
    fresh = library.with_name(f".{library.name}.new")
    link = ["-shared", "-o", str(fresh), f"-L{torch.lib}", "-ltorch", "-ltorch_cpu"]

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "0")) or os.cpu_count() or 1) as pool:
        cpu_jobs, cuda_jobs = [], []
        for source, obj in objects.items():
            if source.suffix == ".cpp":
                command = [*cxx, *CXX_FLAGS, f"-I{CSRC}", "-isystem", str(torch.include), "-c", str(source), "-o", str(obj)]
                cpu_jobs.append(pool.submit(execute, command))
            elif no_cuda is None:
                cuda_jobs.append(pool.submit(execute, nvcc_command(source, obj, torch.include, cxx)))
        try:
            wait_for(cpu_jobs)
        except BuildError:
            pool.shutdown(cancel_futures=True)
            raise
        if no_cuda is None:
            try:
                wait_for(cuda_jobs)
                # nvcc links: it alone knows where its toolkit keeps the runtime, which torch has loaded too.
                execute(["nvcc", *host_compiler(cxx), "-cudart=shared", *map(str, objects.values()), *link, "-ltorch_cuda"])
            except BuildError as error:
                if insists:
                    raise BuildError(f"its CUDA kernels: {error}; DIST_LLM_BUILD=auto leaves them out") from error
                no_cuda = f"building the CUDA kernels failed: {error}"
                print(f"dist_llm: CPU kernels only, {no_cuda}", file=sys.stderr)
    if no_cuda is not None:
        execute([*cxx, *on_cpu, *link])
    fresh.replace(library)
    compiler = subprocess.run([*cxx, "--version"], capture_output=True, text=True, errors="replace", check=False).stdout.splitlines()
    return {
        "built": True,
        "reason": None,
        "compiler": compiler[0] if compiler else cxx[0],
        "torch": torch.version,
        "cuda": no_cuda is None,
        "cuda_reason": no_cuda,
        "seconds": round(time.monotonic() - started, 1),
    }


class BuildKernels(build_ext):
    """Builds dist_llm/_C.so as DIST_LLM_BUILD says, next to the sources for an editable install."""

    def run(self) -> None:
        """Build, or leave the reference path and the reason."""
        mode = os.environ.get("DIST_LLM_BUILD") or "auto"
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"DIST_LLM_BUILD={mode} is not one of auto, 0, 1")
        package = (ROOT if self.inplace else Path(self.build_lib)) / "dist_llm"
        library = package / LIBRARY
        try:
            if mode == "0":
                raise BuildError("DIST_LLM_BUILD=0 when the package was installed")
            info = build(library, Path(self.build_temp), insists=mode == "1")
        except BuildError as error:
            if mode == "1":
                raise SystemExit(f"dist_llm: DIST_LLM_BUILD=1, but the extension cannot be built: {error}") from error
            # A library of an earlier build must not outlive the sources it was made from.
            library.unlink(missing_ok=True)
            info = {"built": False, "reason": str(error)}
            print(f"dist_llm: extension not built, the PyTorch reference path is used: {error}", file=sys.stderr)
        else:
            print(f"dist_llm: built {LIBRARY} in {info['seconds']} s with {info['compiler']}", file=sys.stderr)
        package.mkdir(parents=True, exist_ok=True)
        (package / BUILD_INFO).write_text(json.dumps(info, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: the library knows nothing of Python."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))


if __name__ == "__main__":
    # The extension object makes the wheel a platform wheel and runs BuildKernels; the sources are found by build().
    setup(ext_modules=[Extension("dist_llm._C", sources=[], optional=True)], cmdclass={"build_ext": BuildKernels})
