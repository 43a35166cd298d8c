"""Run the cases of tests/kernels/cases/ on CUDA kernels, emulated.

    python -m tests.cuda_emulator [csrc/<op>/<op>_cuda.cu ...] [--case NAME] [--size NAME] [--dtype fp32|bf16|fp16] [--quick] [--seed N]

Every case whose ops are in the given files (default: all .cu files) is held to the error of its reference in fp32, bf16 and fp16, in bf16 also
with arguments that are aligned to one element only, and to the same bits when blocks and threads run in another order. New tensors are
born full of NaN.
One line a case; exit status 1 when one failed, 3 when no case has its ops in the files or none of the chosen sizes was small enough to run.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import re
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dist_llm.kernels import extension
from tests.cuda_emulator.build import build
from tests.kernels.case import Case, Sample, all_cases, assert_close_to_float64, results

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Exit status. Not 2, which is argparse's for a wrong command line.
NOTHING_RAN = 3
# Numbers in the arguments of a case beyond which the emulation takes too long to wait for.
MOST_NUMBERS = 1 << 18


def use_library(library: Path, scratch: Path) -> None:
    """Make ``library`` the extension of this process: the installed one is not loaded. Tensors get guards from here on."""
    (scratch / "_C.so").symlink_to(library)
    extension.PACKAGE = scratch
    loaded = extension.load_extension()
    if not loaded.loaded:
        raise RuntimeError(str(loaded.why_not))
    ctypes.CDLL(str(library)).dl_guard_tensors()


def with_lines(message: str, library: Path) -> str:
    """The offsets of instructions in a message as lines of the sources."""

    def line_of(match: re.Match[str]) -> str:
        if shutil.which("addr2line") is None:
            return match.group()
        done = subprocess.run(["addr2line", "-e", str(library), match.group(1)], capture_output=True, text=True, check=False)
        return f"[{done.stdout.split()[0]}]" if done.returncode == 0 and done.stdout.split() else match.group()

    return re.sub(r"\[\+(0x[0-9a-f]+)\]", line_of, message)


def shifted(t: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, where they are dense, that is aligned to one element only, with NaN (the largest whole number) around it."""
    if t.numel() == 0:
        return t
    fill = float("nan") if t.is_floating_point() else True if t.dtype == torch.bool else torch.iinfo(t.dtype).max
    whole = torch.full((t.numel() + 2,), fill, dtype=t.dtype)
    return whole.as_strided(t.shape, torch.empty_like(t).stride(), 1).copy_(t)


def shifting(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` with such arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        sample = Sample(args, kwargs).map(shifted)
        return fn(*sample.args, **sample.kwargs)

    return call


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are born full of NaN, or of the largest whole number."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def numbers_of(sample: Sample) -> int:
    """How many numbers all arguments have together."""
    total = 0

    def count(t: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += t.numel()
        return t

    sample.map(count)
    return total


def check(case: Case, size: str, dtype: torch.dtype, *, once: bool) -> str | None:
    """Hold one case to its reference; gives why it was left out, or None. Once: it does not run again in another order."""
    sample = case.make(case.sizes[size], dtype)
    if numbers_of(sample) > MOST_NUMBERS:
        return f"{numbers_of(sample)} numbers"
    fn = next(impl.fn for impl in case.impls if impl.name == "native")
    expected, exact = results(case.reference, sample), results(case.reference, sample.double())
    what = f"{case.name} emulated {size} {dtype}"
    with poisoned_memory():
        ours = results(fn, sample)
        assert_close_to_float64(ours, expected, exact, sample, what)
        if dtype == torch.bfloat16 and not sample.changed:
            assert_close_to_float64(results(shifting(fn), sample), expected, exact, sample, f"{what}, unaligned")
        for index, (one, two) in enumerate(zip(ours, ours if once else results(fn, sample), strict=True)):
            assert torch.equal(one, two), f"result {index} of {what} has other bits when threads and blocks run in another order"
    return None


def run_case(case: Case, sizes: list[str], dtypes: list[torch.dtype], library: Path, *, quick: bool) -> tuple[int, bool]:
    """All sizes and dtypes of a case (quick: the dtypes in turn, one a size, in one order); prints one line, and what failed.

    Returns:
        how many sizes and dtypes ran, and whether all of them are right.
    """
    started, failed, count, left_out = time.perf_counter(), False, 0, []
    launches = ctypes.CDLL(str(library)).dl_launches
    launches.restype = ctypes.c_int64
    before = launches()
    dtypes = [dtype for dtype in dtypes if dtype in (*case.dtypes, *case.gpu_dtypes)]
    for position, size in enumerate(case.sizes):
        if sizes and size not in sizes:
            continue
        for dtype in [dtypes[position % len(dtypes)]] if quick else dtypes:
            try:
                why = check(case, size, dtype, once=quick)
            except (AssertionError, RuntimeError) as error:
                failed, why = True, None
                print(f"FAILED {case.name} {size} {dtype}: {with_lines(str(error), library)}" if str(error) else traceback.format_exc())
            if why is None:
                count += 1
            else:
                left_out.append(f"{size} {dtype}: {why}")
    skipped = f", left out {'; '.join(left_out)}" if left_out else ""
    print(
        f"{'FAILED' if failed else 'ok' if count else 'nothing'} {case.name}: {count} sizes and dtypes, {launches() - before} launches,"
        f" in {time.perf_counter() - started:.1f} s{skipped}",
        flush=True,
    )
    return count, not failed


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, metavar="FILE", help="only these sources (default: every .cu under csrc/)")
    parser.add_argument("--case", action="append", default=[], help="only cases of this name")
    parser.add_argument("--size", action="append", default=[], help="only sizes of this name")
    parser.add_argument("--dtype", action="append", default=[], choices=DTYPES, help="only these dtypes")
    parser.add_argument("--module", help="only the cases of this file of tests/kernels/cases/")
    parser.add_argument("--quick", action="store_true", help="each size in one dtype, the dtypes in turn, and in one order of threads")
    parser.add_argument("--seed", type=int, default=1, help="of the order in which blocks and threads run")
    parser.add_argument("--library", type=Path, help="take this library instead of building one")
    arguments = parser.parse_args()
    os.environ["DL_EMULATOR_SEED"] = str(arguments.seed)
    torch.set_num_threads(1)
    cases = importlib.import_module(f"tests.kernels.cases.{arguments.module}").CASES if arguments.module else all_cases()
    with tempfile.TemporaryDirectory() as scratch:
        library = arguments.library or build(arguments.sources)
        use_library(library, Path(scratch))
        chosen = [
            case
            for case in cases
            if (not arguments.case or case.name in arguments.case)
            and any(impl.name == "native" and impl.why_not(CPU, torch.float32) is None for impl in case.impls)
        ]
        if not chosen:
            print("no case has its ops in these sources")
            return NOTHING_RAN
        dtypes = [DTYPES[name] for name in arguments.dtype or DTYPES]
        counts, right = zip(*[run_case(case, arguments.size, dtypes, library, quick=arguments.quick) for case in chosen], strict=True)
        return 1 if not all(right) else 0 if any(counts) else NOTHING_RAN


if __name__ == "__main__":
    raise SystemExit(main())
