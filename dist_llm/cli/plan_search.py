"""The bare ``dist-llm plan``: what to train, which layouts fit, which is fastest, how long it takes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_llm.utils.errors import ConfigError, ExitCode, StorageError

if TYPE_CHECKING:  # the real imports are in the functions, so that --help stays quick
    from dist_llm.planning.amounts import Fleet
    from dist_llm.planning.cluster import Cluster
    from dist_llm.planning.laws import ChinchillaLaw
    from dist_llm.planning.question import Question
    from dist_llm.planning.search import Search
    from dist_llm.planning.shapes import ModelShape

__all__ = ["add_arguments", "run"]

_FORMATS = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``dist-llm plan`` takes without a sub-verb."""
    what = parser.add_argument_group("what to train (left open: the best model for the devices and the time)")
    what.add_argument("--model", metavar="CONFIG", help="the model, batch and precision of this config")
    what.add_argument("--params", metavar="N", help="a model of about N parameters, as 7B, from a ladder of LLaMA-like shapes")
    what.add_argument("--flops", metavar="C", help="the best model for C training FLOPs, as 1e22")
    what.add_argument(
        "--tokens", metavar="D", help="training tokens, as 300B; default what the scaling law advises, or what the time allows"
    )
    what.add_argument("--moe", metavar="ExA", help="experts in every layer: 8x2 is 8 of which a token meets 2")
    what.add_argument("--law", choices=("replication", "hoffmann"), default="replication", help="scaling law (default: replication)")
    where = parser.add_argument_group("on what")
    where.add_argument("--gpus", metavar="NxDEVICE", help="as 64xH100-80G; left out: a table over numbers of devices")
    where.add_argument("--device", metavar="DEVICE", help="of the table (default H100-80G)")
    where.add_argument("--gpu-memory", metavar="SIZE", help="memory of a device, as 64G, where it is not the device's own")
    where.add_argument("--days", metavar="D", help="time for the run; with model and tokens given, a limit")
    where.add_argument("--hours", metavar="H", help="the same in hours")
    where.add_argument("--job-hours", metavar="H", default="24", help="longest SLURM job (default 24)")
    how = parser.add_argument_group("how")
    how.add_argument("--batch-size", type=int, metavar="ROWS", help="rows in a step; default the config's, or by FLOPs")
    how.add_argument("--seq-len", type=int, metavar="T", help="tokens in a row (default the config's, or 4096)")
    how.add_argument("--vocab-size", type=int, metavar="V", help="of an advised model (default 32768)")
    how.add_argument("--precision", choices=("bf16", "fp32"), help="default the config's, or bf16")
    answer = parser.add_argument_group("the answer")
    answer.add_argument("--top", type=int, default=5, metavar="K", help="layouts shown (default 5)")
    answer.add_argument("--json", action="store_true", help="one JSON object on stdout: model, tokens, flops, layouts, ...")
    answer.add_argument("--plot", type=Path, metavar="FILE", help="draw strong and weak scaling to 16,384 devices (png, svg or pdf)")
    answer.add_argument("--write", type=Path, metavar="DIR", help="write config.yaml and train.sbatch of the fastest layout")
    answer.add_argument("--data", metavar="CORPUS", help="data.path of the written config")
    answer.add_argument("--name", default="planned", metavar="NAME", help="of the written run (default planned)")


def run(args: argparse.Namespace) -> int:
    """Answer the question, in text or as JSON; exit code 1 when the answer is no."""
    from dist_llm.planning.amounts import parse_amount, parse_bytes, parse_fleet, whole_nodes

    _check(args)
    fleet = parse_fleet(args.gpus) if args.gpus is not None else None
    if fleet is not None:
        whole_nodes(fleet, f"--gpus {args.gpus}")
    args.limit_bytes = parse_bytes(args.gpu_memory, "--gpu-memory") if args.gpu_memory is not None else None
    args.job_hours = parse_amount(args.job_hours, "--job-hours", unit="hours", example="24")
    if fleet is None:
        return _table(args)
    question, search = _ask(args, fleet)
    return _answer(args, fleet, question, search)


def _check(args: argparse.Namespace) -> None:
    models = [f"--{name}" for name in ("model", "params", "flops") if getattr(args, name) is not None]
    if len(models) > 1:
        raise ConfigError(f"{' and '.join(models)} both say which model; give one of them")
    if args.days is not None and args.hours is not None:
        raise ConfigError("--days and --hours both say how long; give one of them")
    if not models and (args.gpus is None or (args.days is None and args.hours is None)):
        raise ConfigError(
            "say what to plan: `--gpus 64xH100-80G --days 14`, `--model CONFIG --tokens 300B --gpus 64xH100-80G`, or `--flops 1e22`; "
            "`dist-llm plan --help` lists everything"
        )
    if args.flops is not None and args.tokens is not None:
        raise ConfigError("--flops says how many tokens already; leave --tokens out, or give --params instead of --flops")
    if not models and args.tokens is not None:
        raise ConfigError("--tokens needs a model: --model CONFIG or --params N")
    for name in ("batch_size", "seq_len", "vocab_size", "top"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.model is not None and args.vocab_size is not None:
        raise ConfigError("--vocab-size is for advised models; the config of --model says its own")
    if args.plot is not None and args.plot.suffix.lower() not in _FORMATS:
        raise ConfigError(f"--plot {args.plot}: the name must end in {', '.join(_FORMATS)}")
    if args.write is not None and args.gpus is None:
        raise ConfigError("--write needs --gpus: the script asks for a number of devices")
    if args.write is not None and args.moe is not None:
        raise ConfigError("--write: the trainer cannot train a mixture of experts yet; plan it without --write, or without --moe")
    if args.device is not None and args.gpus is not None:
        raise ConfigError("--gpus says the device; leave --device out")


def _seconds(args: argparse.Namespace) -> float | None:
    from dist_llm.planning.amounts import parse_amount

    if args.days is not None:
        return 86400.0 * parse_amount(args.days, "--days", unit="days", example="14")
    return 3600.0 * parse_amount(args.hours, "--hours", unit="hours", example="36") if args.hours is not None else None


def _law(args: argparse.Namespace) -> ChinchillaLaw:
    from dist_llm.planning.advice import LAWS

    return LAWS[args.law]


def _ladder(args: argparse.Namespace) -> list[ModelShape]:
    from dist_llm.planning.advice import model_ladder
    from dist_llm.planning.amounts import parse_experts

    experts, active = parse_experts(args.moe) if args.moe is not None else (0, 0)
    return model_ladder(_vocabulary(args), args.seq_len or 4096, experts=experts, active=active)


def _vocabulary(args: argparse.Namespace) -> int:
    if args.data is None:
        return args.vocab_size or 32768
    from dist_llm.data.index import read_index

    size = read_index(args.data).tokenizer.vocab_size
    if args.vocab_size is not None and args.vocab_size < size:
        raise ConfigError(
            f"--vocab-size {args.vocab_size} is less than the {size} words of the tokenizer of --data {args.data}; leave it out"
        )
    return args.vocab_size or size


def _ask(args: argparse.Namespace, fleet: Fleet) -> tuple[Question, Search]:
    """The question made definite, and the search of its layouts."""
    from dataclasses import replace

    from dist_llm.planning.question import about_time, tokens_in_time
    from dist_llm.planning.search import Search

    seconds = _seconds(args)
    if args.model is None and args.params is None and args.flops is None:
        assert seconds is not None
        return about_time(
            fleet,
            seconds,
            _ladder(args),
            _law(args),
            batch_size=args.batch_size,
            precision=args.precision or "bf16",
            limit_bytes=args.limit_bytes,
        )
    question = _question(args, fleet.gpus, seconds)
    search = Search(question.model, fleet.gpus, fleet.cluster, question.batch_size, question.precision, args.limit_bytes, question.kernels)
    if seconds is not None and args.flops is None and not question.tokens_said and (best := search.best(1)):
        # Nobody said how many tokens: as many as the time allows.
        tokens = tokens_in_time(seconds, best[0].step.total_s, question.batch_size, question.model.seq_len)
        if tokens is not None:
            question = replace(question, tokens=tokens)
    return question, search


def _question(args: argparse.Namespace, gpus: int, seconds: float | None) -> Question:
    from dataclasses import replace

    from dist_llm.planning.amounts import parse_amount, parse_experts
    from dist_llm.planning.question import about_flops, about_model, nearest_shape
    from dist_llm.planning.shapes import from_config

    law, batch = _law(args), args.batch_size
    if args.flops is not None:
        flops = parse_amount(args.flops, "--flops", unit="FLOPs", example="1e22")
        return about_flops(flops, _ladder(args), law, gpus=gpus, batch_size=batch, precision=args.precision or "bf16", seconds=seconds)
    tokens = parse_amount(args.tokens, "--tokens", unit="tokens", example="300B") if args.tokens is not None else None
    config, precision = None, args.precision or "bf16"
    if args.params is not None:
        params = parse_amount(args.params, "--params", unit="parameters", example="7B")
        model = nearest_shape(params, _ladder(args))
    else:
        from dist_llm.config.load import load_config

        config = load_config(args.model).config
        if args.seq_len is not None and args.seq_len > config.model.max_seq_len:
            raise ConfigError(f"--seq-len {args.seq_len} must be at most model.max_seq_len ({config.model.max_seq_len}) of {args.model}")
        model = from_config(config.model, args.seq_len or config.data.seq_len)
        config = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": model.seq_len})})
        precision, batch = args.precision or config.precision, batch or config.train.batch_size
        config = config.model_copy(update={"precision": precision})
        if args.moe is not None:
            experts, active = parse_experts(args.moe)
            model = replace(model, num_experts=experts, experts_per_token=active)
    return about_model(model, law, tokens=tokens, gpus=gpus, batch_size=batch, precision=precision, seconds=seconds, config=config)


def _answer(args: argparse.Namespace, fleet: Fleet, question: Question, search: Search) -> int:
    from dist_llm.cli.plan_search_text import answer_as_text, no_as_text
    from dist_llm.planning.answer import costs_of, describe
    from dist_llm.planning.summary import pareto_rows, refusal_rows, summary

    best = search.best(args.top, distinct=True)
    model, tokens = question.model, question.tokens
    answer: dict[str, Any] = summary(question)
    answer["gpus"], answer["device"] = fleet.gpus, fleet.cluster.device
    answer["layouts"] = [describe(plan, model, fleet.cluster, tokens, args.job_hours) for plan in best]
    answer["rejected"] = refusal_rows(search)
    late = (
        bool(best) and question.seconds is not None and costs_of(best[0], model, fleet.cluster, tokens, 24).hours * 3600 > question.seconds
    )
    if not best or late:
        answer["impossible"] = _no(args, fleet, question, search, late)
        print(json.dumps(answer) if args.json else no_as_text(answer, fleet))
        return ExitCode.CHECK_FAILED
    answer["pareto"] = pareto_rows(search, question, fleet.cluster, args.limit_bytes)
    if args.write is not None:
        from dist_llm.planning.write import write_plan

        written = write_plan(args.write, question, best[0], fleet, name=args.name, data=args.data, job_hours=args.job_hours)
        answer["written"] = {"config": str(written.config), "sbatch": str(written.sbatch), "data": written.data}
    _draw(args, fleet.cluster, question)
    print(json.dumps(answer) if args.json else answer_as_text(answer, fleet))
    return ExitCode.DONE


def _no(args: argparse.Namespace, fleet: Fleet, question: Question, search: Search, late: bool) -> dict[str, Any]:
    from dist_llm.planning.answer import describe
    from dist_llm.planning.growth import MOST_GPUS, smallest_cluster

    found = smallest_cluster(
        question.model, fleet.cluster, question.batch_size, question.tokens, question.seconds,
        precision=question.precision, limit_bytes=args.limit_bytes, kernels=question.kernels,
    )  # fmt: skip
    plans = {"fits": found.fits, "in_time": found.in_time if question.seconds is not None else None, "fastest": found.fastest}
    rows = {
        name: describe(plan, question.model, fleet.cluster, question.tokens, args.job_hours) if plan is not None else None
        for name, plan in plans.items()
    }
    _, least = search.memory_refusal()
    reason = "time" if late else "memory" if least is not None else "rules"
    return {
        "reason": reason,
        "limit_bytes": search.limit_bytes,
        "smallest_bytes": least,
        "deadline_hours": question.seconds / 3600 if question.seconds is not None else None,
        "most_gpus": MOST_GPUS,
        **rows,
    }


def _table(args: argparse.Namespace) -> int:
    from dist_llm.cli.plan_search_text import table_as_text
    from dist_llm.planning.amounts import device_cluster
    from dist_llm.planning.answer import describe
    from dist_llm.planning.growth import over_counts
    from dist_llm.planning.summary import summary

    device = args.device or "H100-80G"
    cluster = device_cluster(device, f"--device {device}")
    question = _question(args, 1, _seconds(args))
    answer = summary(question)
    answer["device"] = cluster.device
    asked = {"precision": question.precision, "limit_bytes": args.limit_bytes, "kernels": question.kernels}
    plans = over_counts(question.model, cluster, question.batch_size, **asked)
    answer["layouts"] = [describe(plan, question.model, cluster, question.tokens, args.job_hours) for _, plan in plans if plan is not None]
    limit_h = question.seconds / 3600 if question.seconds is not None else None
    in_time = [row for row in answer["layouts"] if limit_h is None or row["hours"] <= limit_h]
    answer["deadline_hours"], answer["smallest_in_time"] = limit_h, in_time[0]["gpus"] if in_time else None
    _draw(args, cluster, question)
    print(json.dumps(answer) if args.json else table_as_text(answer))
    return ExitCode.DONE if in_time else ExitCode.CHECK_FAILED


def _draw(args: argparse.Namespace, cluster: Cluster, question: Question) -> None:
    if args.plot is None:
        return
    from dist_llm.planning.scaling_plot import draw_scaling

    try:
        asked = {"precision": question.precision, "limit_bytes": args.limit_bytes, "kernels": question.kernels}
        draw_scaling(question.model, cluster, question.batch_size, args.plot, **asked)
    except OSError as error:
        raise StorageError(f"cannot write {args.plot}: {error.strerror or error}") from None
    print(f"drew {args.plot}", file=sys.stderr)
