"""Measure: this machine's training speed, and our code against its peers.

dist-llm bench speed --json              tokens/s of a few model sizes; start it with a launcher to measure several ranks
dist-llm bench step --threads 1 --json   one rank under our loop against the same model in PyTorch, torch.compile, Hugging Face, DeepSpeed
dist-llm bench zero1 --json              what ZeRO-1 on two ranks costs beyond the step and its communication
dist-llm bench coord-check CONFIG        sizes of activations over widths, with and without muP
dist-llm bench rms_norm --threads 1      one kernel against torch, torch.compile and float64; `bench --help` lists the others
dist-llm bench --all --threads 1         all kernels, as the table of docs/benchmarks/kernels.md
dist-llm bench machine --out FILE        products, memory and collectives of this machine, as a cluster description for `plan`
"""

from __future__ import annotations

import argparse
import json
import sys

from dist_llm.bench.kernel_cases import KERNEL_CASES
from dist_llm.cli import bench_coord_check, bench_kernels, bench_machine

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dist-llm bench``."""
    bench_kernels.add_all_arguments(parser)
    cases = parser.add_subparsers(dest="case", metavar="CASE")
    speed = cases.add_parser("speed", help="tokens a second of a few model sizes")
    speed.add_argument(
        "--widths", type=int, nargs="+", default=[32, 64, 128, 256], metavar="D", help="model widths (default 32 64 128 256)"
    )
    speed.add_argument("--vocab-size", type=int, default=2048, metavar="V")
    speed.add_argument("--seq-len", type=int, default=256, metavar="T")
    speed.add_argument("--batch-size", type=int, default=16, metavar="B", help="rows in a step over all ranks")
    speed.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=1)
    speed.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    speed.add_argument("--seconds", type=float, default=1.5, metavar="S", help="time for each size (default 1.5)")
    speed.add_argument("--out", metavar="FILE", help="write the answer to FILE as well")
    step = cases.add_parser("step", help="one training step against the same model in PyTorch, torch.compile, Hugging Face and DeepSpeed")
    step.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (default: all cores)")
    step.add_argument("--rounds", type=int, default=9, metavar="N", help="interleaved rounds; medians are reported (default 9)")
    step.add_argument(
        "--malloc", choices=["tuned", "default"], default="tuned", help="glibc's allocator: as `train` sets it, or as it comes"
    )
    step.add_argument("--profile", action="store_true", help="also print where the time of our step goes")
    zero1 = cases.add_parser("zero1", help="ZeRO-1 on two ranks against the plain step and its communication")
    zero1.add_argument("--rounds", type=int, default=9, metavar="N", help="interleaved rounds; medians are reported (default 9)")
    coord_check = cases.add_parser("coord-check", help="sizes of activations over widths, with and without muP")
    bench_coord_check.add_arguments(coord_check)
    machine = cases.add_parser("machine", help="what this machine does, as a cluster description for `plan`")
    bench_machine.add_arguments(machine)
    for name, what in KERNEL_CASES.items():
        bench_kernels.add_arguments(cases.add_parser(name, help=what))
    for case in (speed, step, zero1, coord_check, machine):
        case.add_argument("--json", action="store_true", help="answer with one JSON object on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Run ``dist-llm bench``."""
    from dist_llm.utils.errors import ConfigError

    if arguments.all:
        if arguments.case is not None:
            raise ConfigError(f"bench --all races every kernel; leave {arguments.case} out, or --all")
        return bench_kernels.run_all(arguments)
    if arguments.case is None:
        raise ConfigError(f"bench needs a CASE ({', '.join(_CASES)}) or --all")
    if option := bench_kernels.misplaced(arguments):
        raise ConfigError(f"--{option} belongs behind the case: dist-llm bench {arguments.case} --{option} ...")
    return _CASES[arguments.case](arguments)


def _speed(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from dist_llm.bench.speed import measure_speed
    from dist_llm.engine.ranks import read_launch
    from dist_llm.planning.budget import ladder
    from dist_llm.utils.errors import ConfigError, ExitCode
    from dist_llm.utils.files import write_json

    launch = read_launch()
    known = sorted({m.d_model for m in ladder(arguments.vocab_size, arguments.seq_len)})
    if unknown := [w for w in arguments.widths if w not in known]:
        raise ConfigError(f"--widths {unknown[0]} is not a width of the ladder; choose from {known}")
    if arguments.batch_size % launch.world_size:
        raise ConfigError(f"--batch-size {arguments.batch_size} does not divide over {launch.world_size} ranks")
    answer = measure_speed(
        launch,
        widths=arguments.widths,
        vocab_size=arguments.vocab_size,
        seq_len=arguments.seq_len,
        batch_size=arguments.batch_size,
        zero=arguments.zero,
        precision=arguments.precision,
        seconds_each=arguments.seconds,
    )
    if not launch.is_main:
        return ExitCode.DONE
    if arguments.out:
        write_json(Path(arguments.out), answer)
    if arguments.json:
        print(json.dumps(answer))
        return ExitCode.DONE
    print(f"{answer['ranks']} rank(s), {answer['threads']} thread(s) each, {answer['precision']}, {answer['batch_tokens']} tokens a step")
    for point in answer["points"]:
        print(f"  {point['num_layers']:3d} x {point['d_model']:<5d} {point['tokens_per_s']:>12,.0f} tokens/s", file=sys.stdout)
    return ExitCode.DONE


def _step(arguments: argparse.Namespace) -> int:
    from dist_llm.bench.answer import encode
    from dist_llm.bench.kernels.race import is_less_accurate
    from dist_llm.bench.step import race_step, step_as_text
    from dist_llm.utils.errors import ExitCode

    answer = race_step(
        threads=arguments.threads, rounds=arguments.rounds, profile=arguments.profile, tuned_malloc=arguments.malloc == "tuned"
    )
    print(encode(answer) if arguments.json else step_as_text(answer))
    return ExitCode.CHECK_FAILED if is_less_accurate(answer) else ExitCode.DONE


def _zero1(arguments: argparse.Namespace) -> int:
    from dist_llm.bench.zero import race_zero1, zero1_as_text
    from dist_llm.utils.errors import ExitCode

    answer = race_zero1(rounds=arguments.rounds)
    print(json.dumps(answer) if arguments.json else zero1_as_text(answer))
    return ExitCode.DONE


_CASES = {
    "speed": _speed,
    "step": _step,
    "zero1": _zero1,
    "coord-check": bench_coord_check.run,
    "machine": bench_machine.run,
    **dict.fromkeys(KERNEL_CASES, bench_kernels.run),
}
