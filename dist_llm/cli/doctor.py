"""Say what is installed and active on this machine, what is not, and why.

Each line has a mark: `ok` works, `off` is not used here and need not be, `missing` is needed and is not there.
Exit status 0 when a model can be trained here (the PyTorch reference path counts), 1 otherwise.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dist_llm import __version__
from dist_llm.cluster.inspect import LAUNCHERS, available_cores, available_memory, free_disk, launcher_path, slurm
from dist_llm.utils.errors import ExitCode

if TYPE_CHECKING:
    import torch

    from dist_llm.kernels.impl import Impl

__all__ = ["Finding", "add_arguments", "examine", "run"]

# distribution, oldest usable version, what it is for. Without a `required` one nothing can be trained.
REQUIRED = (
    ("torch", "2.11", "tensors, autograd, collectives"),
    ("numpy", "1.26", "arrays of tokens"),
    ("pydantic", "2.7", "the config schema"),
    ("PyYAML", "6.0", "config files"),
    ("safetensors", "0.4.5", "checkpoints"),
    ("sentencepiece", "0.2", "the tokenizer"),
)
OPTIONAL = (
    ("deepspeed", "0.19.8", "the engine on more than one rank; one rank trains without it"),
    ("webdataset", "1.0.2", "writing shards and reading foreign ones"),
    ("wandb", "0.19", "a mirror of the metrics"),
    ("tensorboard", "2.16", "a mirror of the metrics"),
    ("matplotlib", "3.8", "plots of the report"),
    ("Jinja2", "3.1", "the HTML report"),
    ("rich", "13", "the progress bar"),
    ("scipy", "1.11", "fits of scaling laws"),
)
VENDORS = (
    ("flash-attn", "attention on NVIDIA GPUs"),
    ("apex", "fused norms on NVIDIA GPUs"),
)
MIN_FREE_DISK = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis: ``mark`` is ok, off or missing, ``value`` a version, name or number, ``text`` a sentence."""

    section: str
    name: str
    mark: str
    value: str | None
    text: str


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> Iterator[Finding]:
    """Python, this package and what it stands on, from the installed metadata: nothing is imported."""
    python = platform.python_version()
    new_enough = sys.version_info >= (3, 11)
    yield Finding("versions", "python", "ok" if new_enough else "missing", python, "3.11 or newer is needed")
    yield Finding("versions", "dist-llm", "ok", __version__, f"installed in {Path(__file__).resolve().parent.parent}")
    for packages, absent in ((REQUIRED, "missing"), (OPTIONAL, "off")):
        for distribution, oldest, purpose in packages:
            version = _installed(distribution)
            if version is None:
                yield Finding("versions", distribution, absent, None, f"{purpose}: not installed; pip install '{distribution}>={oldest}'")
            elif _numbers(version) < _numbers(oldest):
                yield Finding("versions", distribution, absent, version, f"{purpose}: {oldest} or newer is needed")
            else:
                yield Finding("versions", distribution, "ok", version, purpose)


def extension() -> Iterator[Finding]:
    """The compiled extension."""
    from dist_llm.kernels.extension import load_extension

    found = load_extension()
    if not found.loaded:
        yield Finding("extension", "compiled kernels", "off", None, f"{found.why_not}. The PyTorch reference path is used")
        return
    built = f"built by {found.build.get('compiler', 'an unknown compiler')} with torch {found.build.get('torch', 'unknown')}"
    yield Finding("extension", "compiled kernels", "ok", found.cpu_isa, f"CPU kernels use {found.cpu_isa}; {built}")
    cuda = bool(found.build.get("cuda"))
    yield Finding(
        "extension",
        "CUDA kernels",
        "ok" if cuda else "off",
        None,
        "built" if cuda else f"not built: {found.build.get('cuda_reason', 'unknown')}",
    )


def ops() -> Iterator[Finding]:
    """Each op's implementations for bf16, on the CPU and on the first GPU if there is one."""
    import torch

    from dist_llm.kernels.table import TABLES

    devices = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
    for op in sorted({table[0].op for table in TABLES.values()}):
        functions = {function: table for function, table in TABLES.items() if table[0].op == op}
        for device in devices:
            answers = {function: _answers(table, device) for function, table in functions.items()}
            if len(set(map(tuple, answers.values()))) == 1:  # the functions of a folder mostly run under the same conditions
                answers = {op: next(iter(answers.values()))}
            for name, found in answers.items():
                yield from (Finding("ops", f"{name} ({device.type}, bf16)", mark, impl, text) for mark, impl, text in found)


def _answers(table: tuple[Impl, ...], device: torch.device) -> list[tuple[str, str, str]]:
    """Mark, name and sentence of each implementation."""
    import torch

    from dist_llm.kernels.impl import NEVER_RUN

    answers, taken = [], False
    for impl in table:
        reason = impl.why_not(device, torch.bfloat16)
        mark = "ok" if reason is None else "off"
        asks = f"kernels.{impl.op}={impl.name} asks for it"
        if reason is None and impl.name in NEVER_RUN.get(device.type, ()):
            reason = f"can run, but never has on {device.type}: auto passes over it, {asks}"
        elif reason is None:
            reason, taken = (f"can run; {asks}" if taken else "taken by auto"), True
        answers.append((mark, impl.name, reason))
    return answers


def vendors() -> Iterator[Finding]:
    """Optional kernels of others."""
    for distribution, purpose in VENDORS:
        version = _installed(distribution)
        if version is None:
            yield Finding("vendors", distribution, "off", None, f"{purpose}: not installed, which is fine; nothing needs it")
        else:
            yield Finding("vendors", distribution, "off", version, f"{purpose}: installed; the ops above say where it is taken")


def devices() -> Iterator[Finding]:
    """What torch can compute on."""
    import torch

    yield Finding(
        "devices", "cpu", "ok", f"{available_cores()} cores", f"{platform.machine()}, torch uses {torch.get_num_threads()} threads"
    )
    if not torch.cuda.is_available():
        reason = (
            f"torch {torch.__version__} is a CPU build" if torch.version.cuda is None else "torch sees no usable NVIDIA device or driver"
        )
        yield Finding("devices", "cuda", "off", None, reason)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        yield Finding("devices", f"cuda:{index}", "ok", properties.name, f"{capability}, {properties.total_memory / 2**30:.0f} GiB")


def launchers() -> Iterator[Finding]:
    """What can start several ranks."""
    for name in LAUNCHERS:
        path = launcher_path(name, Path(sys.executable).parent)
        yield Finding("launchers", name, "ok" if path else "off", None, path or f"{name} is neither beside this Python nor on PATH")


def cluster() -> Iterator[Finding]:
    """Slurm."""
    found = slurm()
    text = found.why_not if found.why_not is not None else "the controller answers"
    yield Finding("slurm", "slurm", "ok" if found.reachable else "off", found.version, text)


def machine() -> Iterator[Finding]:
    """Memory, and disk where runs are written."""
    memory = available_memory()
    size = None if memory is None else f"{memory / 2**30:.1f} GiB"
    yield Finding("machine", "memory", "ok" if memory else "off", size, "available now" if memory else "this system does not say")
    here = Path.cwd()
    free = free_disk(here)
    enough = free >= MIN_FREE_DISK
    text = f"free in {here}" if enough else f"free in {here}: a run wants at least {MIN_FREE_DISK / 2**30:.0f} GiB; free some space"
    yield Finding("machine", "disk", "ok" if enough else "missing", f"{free / 2**30:.1f} GiB", text)


SECTIONS: tuple[Callable[[], Iterator[Finding]], ...] = (versions, extension, ops, vendors, devices, launchers, cluster, machine)
# A section that breaks makes training impossible only where training stands on it.
ESSENTIAL = frozenset({"versions", "ops", "devices"})


def examine(sections: tuple[Callable[[], Iterator[Finding]], ...] = SECTIONS) -> list[Finding]:
    """All findings. A part that breaks becomes a finding itself; the rest is still examined."""
    findings: list[Finding] = []
    for section in sections:
        try:
            findings += section()
        except Exception as error:  # noqa: BLE001 - a broken installation fails in any way; saying so is what this verb is for
            name = section.__name__
            mark = "missing" if name in ESSENTIAL else "off"
            findings.append(Finding(name, "broken", mark, type(error).__name__, str(error).strip() or "no message"))
    return findings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dist-llm doctor``."""
    parser.add_argument(
        "--json", action="store_true", help='print one JSON object: {"ok", "findings": [{"section", "name", "mark", "value", "text"}]}'
    )


def _table(findings: list[Finding]) -> str:
    name_width = max(len(f.name) for f in findings)
    value_width = min(28, max(len(f.value or "") for f in findings))
    lines, section = [], None
    for f in findings:
        if f.section != section:
            lines.append(f"{'' if section is None else chr(10)}{f.section}")
            section = f.section
        # Messages of torch and of compilers can span lines; here each finding is one.
        text = " ".join(f.text.split())
        lines.append(f"  {f.mark:<7}  {f.name:<{name_width}}  {f.value or '-':<{value_width}}  {text}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Examine, print, and say whether training can run here."""
    findings = examine()
    missing = [f"{f.section}/{f.name}" for f in findings if f.mark == "missing"]
    if args.json:
        print(json.dumps({"ok": not missing, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        verdict = f"training cannot run here: {', '.join(missing)}" if missing else "training can run here"
        print(f"{_table(findings)}\n\n{verdict}")
    return int(ExitCode.CHECK_FAILED if missing else ExitCode.DONE)
