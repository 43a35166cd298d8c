"""The compiled extension: found, loaded once, and asked which instructions it uses.

The library registers device code for ops whose schemas are declared in Python; it is not a Python module. Where it was not built,
or does not load, every op still has its PyTorch reference, and the reason is kept for people to read in ``dist-llm doctor``.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_llm.utils.errors import ConfigError

__all__ = ["Extension", "load_extension", "why_no_kernel"]

PACKAGE = Path(__file__).resolve().parent.parent
OLDEST_GPU = (8, 0)  # what setup.py compiles for first; nothing older can run that
# Of activations, on each kind of device; csrc/common/tensors.h and cuda_tensors.h have the same.
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}

torch.library.define("dist_llm::cpu_isa", "() -> str")
torch.library.define("dist_llm::cpu_multiplies_bf16", "() -> bool")


@dataclass(frozen=True)
class Extension:
    """What became of the extension in this process.

    Attributes:
        loaded: the compiled kernels can be called.
        why_not: why not, otherwise None.
        cpu_isa: vector instructions of the CPU kernels: avx512, avx2 or generic; None when not loaded.
        build: what the build wrote down (compiler, torch, CUDA or why not); empty when there was none.
    """

    loaded: bool
    why_not: str | None
    cpu_isa: str | None
    build: dict[str, object]


def _build_info(package: Path) -> dict[str, object]:
    path = package / "_build_info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        return {"built": False, "reason": f"{path} is not valid JSON ({error})"}
    return info if isinstance(info, dict) else {}


def open_extension(package: Path) -> Extension:
    """Load ``_C.so`` of the installed ``package`` directory.

    Raises:
        ConfigError: DIST_LLM_CPU_ISA asks for instructions that are unknown or that this processor does not have.
    """
    build = _build_info(package)
    library = package / "_C.so"
    if not library.is_file():
        reason = build.get("reason") or "the package was never built here"
        return Extension(False, f"the extension is not built: {reason}; install with DIST_LLM_BUILD=1 to insist", None, build)
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        made_for = build.get("torch", "another torch")
        reason = (
            f"the extension, built with torch {made_for}, does not load with torch {torch.__version__}: {error}; install the package again"
        )
        return Extension(False, reason, None, build)
    try:
        isa = str(torch.ops.dist_llm.cpu_isa())
    except RuntimeError as error:
        raise ConfigError(next((line for line in str(error).splitlines() if "DIST_LLM_CPU_ISA" in line), str(error))) from error
    return Extension(True, None, isa, build)


@functools.cache
def load_extension() -> Extension:
    """The extension of this package, loaded at the first call of the process.

    Raises:
        ConfigError: DIST_LLM_CPU_ISA asks for instructions that are unknown or that this processor does not have.
    """
    return open_extension(PACKAGE)


def why_no_kernel(op: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why the compiled kernel of ``op`` cannot be called on ``device``, or None when it can. Loads the extension at the first call.

    Args:
        op: its name in ``torch.ops.dist_llm``.
        device: of the tensors.
        dtype: of the activations; None where the op has no choice of them.
    """
    supported = DTYPES.get(device.type, DTYPES["cpu"])
    if dtype is not None and dtype not in supported:
        return f"on {device.type} it takes {', '.join(map(str, supported))}, not {dtype}"
    extension = load_extension()
    if not extension.loaded:
        return extension.why_not
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None:
        return f"there is no compiled kernel for {device.type}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"dist_llm::{op}", key):
        # Asked last, and only where there is a GPU: the question makes torch initialise CUDA.
        if device.type == "cuda" and torch.cuda.is_available():
            capability = torch.cuda.get_device_capability(device)
            if capability < OLDEST_GPU:
                return f"the CUDA kernels need compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}, this GPU has {capability[0]}.{capability[1]}"
        return None
    reason = extension.build.get("cuda_reason") if device.type == "cuda" else None
    return f"the extension has no {key} kernel for it" + (f": {reason} when it was built" if reason else "")
