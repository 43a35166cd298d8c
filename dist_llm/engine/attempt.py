"""One attempt of a run on this rank: meet, agree on the start, build, loop, and leave together.

Rank 0 decides what touches the disk; its decision, or its refusal, is broadcast, so that all ranks go on or all stop with the
same exit code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from dist_llm.cluster.exit_file import next_attempt, write_exit
from dist_llm.cluster.health import Failure, HealthDir
from dist_llm.cluster.owner import RunOwner
from dist_llm.comm.collectives import all_reduce_max, all_reduce_sum, broadcast_json
from dist_llm.comm.context import ParallelContext
from dist_llm.comm.ledger import CommLedger
from dist_llm.config.load import ConfigErrors
from dist_llm.config.rules import problems_for_ranks
from dist_llm.config.schema import RunConfig
from dist_llm.data.rows import RowDataset
from dist_llm.engine.build import build_engine, choose_ops, compute_dtype, uses_deepspeed
from dist_llm.engine.faults import ending_of
from dist_llm.engine.forecast import write_forecast
from dist_llm.engine.launch import close_context, open_context, tune_allocator
from dist_llm.engine.loop import Loop
from dist_llm.engine.peak import peak_flops
from dist_llm.engine.ranks import Launch
from dist_llm.engine.record import NullRecorder, Recorder, RunRecorder
from dist_llm.engine.run_dir import Start, checkpoint_at, corpus_hash, decide_start, write_description
from dist_llm.engine.stop import StopFlag
from dist_llm.engine.watch import Watch
from dist_llm.kernels.impl import Impl
from dist_llm.kernels.table import LAYOUT_TABLES
from dist_llm.models.ops import Ops
from dist_llm.parallel.divide import grid_of
from dist_llm.report.metrics import read_events
from dist_llm.utils.errors import ConfigError, ExitCode, UserError

__all__ = ["open_rows", "run_attempt"]

# What a training run calls; the tables also have functions that only tools and later models do.
CALLED = frozenset(field.name for field in fields(Ops)) | {"adamw_step"}


def open_rows(config: RunConfig) -> tuple[RowDataset, RowDataset | None]:
    """Training and validation rows of the config's corpus; no validation rows when that split is empty.

    Raises:
        ConfigError: no data.path, or the tokenizer has more tokens than the model has rows.
        DataError: the corpus is missing or damaged.
    """
    if config.data.path is None:
        raise ConfigError("data.path is not set; make a corpus with `dist-llm data prepare --out DIR` and set data.path=DIR")
    train, val = (
        RowDataset(config.data.path, split=split, seq_len=config.data.seq_len, seed=config.seed, shuffle=config.data.shuffle)
        for split in ("train", "val")
    )
    tokens = train.index.tokenizer.vocab_size
    if tokens > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {config.data.path} has {tokens} tokens; "
            f"set model.vocab_size={tokens}, or prepare the corpus with --vocab-size {config.model.vocab_size}"
        )
    train.row(0)  # refuses, now and not after the launch, a corpus shorter than one row
    return train, val if val.num_eval_rows else None


def run_attempt(config: RunConfig, launch: Launch, stop: StopFlag) -> int:
    """Train, and return the exit code; every rank calls this, with its signals already caught by ``stop``.

    Raises:
        UserError: something a person can mend; the same on every rank where it could be agreed on.
    """
    problems = problems_for_ranks(config, launch.world_size)
    if problems:
        refusal = ConfigErrors(problems)
        refusal.is_echo = not launch.is_main
        raise refusal
    deepspeed = uses_deepspeed(config, launch.world_size)
    run_dir = Path(config.directory)
    progress: dict[str, Any] = {"step": None}
    with ExitStack() as stack:
        stop.at_once = lambda: _say_stopped_at_once(run_dir, launch, progress, None)
        ledger = stack.enter_context(CommLedger())  # before DeepSpeed exists: it keeps references to the functions
        if not torch.cuda.is_available():
            tune_allocator()
        ctx = open_context(
            launch,
            needs_process_group=deepspeed,
            threads=config.train.threads,
            grid=grid_of(config.parallel, launch.world_size),
            kv_heads=config.model.kv_heads,
        )
        stack.callback(close_context)
        ledger.name_groups(ctx.named_groups())
        with _agreed(ctx, "opening the corpus"):
            train_rows, eval_rows = open_rows(config)
        chosen = choose_ops(config, ctx)
        names = {op: impl.name for op, impl in chosen.items()}

        decision: dict[str, Any] = {}
        if ctx.is_main:
            decision = _decide(stack, config, launch, train_rows, names, ctx.device)
        decision = broadcast_json(decision, ctx.world, ctx.device)
        if "refused" in decision:
            raise _rebuilt(decision, is_echo=not ctx.is_main)
        attempt, start = decision["attempt"], Start(**decision["start"])
        if decision["finished"]:
            if ctx.is_main:
                print(f"{run_dir} is finished: step {start.step} of {config.train.steps}; nothing to do", file=sys.stderr)
            return ExitCode.DONE
        progress.update(step=start.step, attempt=attempt)
        stack.enter_context(_rank_log(run_dir, attempt, ctx.world.rank))
        with _agreed(ctx, "announcing a rank in the run directory"):
            watch = Watch(HealthDir(run_dir, attempt), run_dir, ctx, progress)
        watch.start(ctx)
        stop.at_once = lambda: _say_stopped_at_once(run_dir, launch, progress, watch)
        try:
            recorder: Recorder = NullRecorder()
            if ctx.is_main:
                recorder = RunRecorder(run_dir, config, start_step=start.step, attempt=attempt)
                stack.callback(recorder.close)
                for note in start.notes:
                    recorder.note(note)
                recorder.note(_headline(config, launch, chosen, deepspeed=deepspeed))
            peak = peak_flops(ctx.device, compute_dtype(config))
            (peak_sum,) = all_reduce_sum([peak or 0.0], ctx.world, ctx.device)
            with _agreed(ctx, "building the engine"):
                checkpoint = checkpoint_at(start)
            if ctx.is_main:
                known = peak_sum if peak is not None else None
                write_forecast(config, ctx, recorder.note, plain=not deepspeed, attempt=attempt, start=start, peak=peak, peak_sum=known)
            engine = build_engine(config, ctx, chosen, checkpoint)
            stack.callback(engine.close)
            loop = Loop(
                config,
                ctx,
                engine,
                train_rows=train_rows,
                eval_rows=eval_rows,
                start=start,
                recorder=recorder,
                ledger=ledger,
                peak_flops=peak_sum if peak is not None else None,
                progress=progress,
            )
            code = loop.run(stop)
        except BaseException as caught:
            ending = ending_of(caught, config, watch, rank=ctx.world.rank, world_size=ctx.world.size, step=progress["step"])
            if ending is caught:
                raise
            raise ending from caught
        watch.leave()
        if ctx.is_main:
            reason = {ExitCode.DONE: "finished"}.get(ExitCode(code), "asked to stop; saved")
            write_exit(run_dir, code=code, reason=reason, rank=0, host=socket.gethostname(), step=loop.step, attempt=attempt)
        return code


def _decide(
    stack: ExitStack, config: RunConfig, launch: Launch, rows: RowDataset, kernels: dict[str, str], device: torch.device
) -> dict[str, Any]:
    """On rank 0: take the directory, find the start, describe the run. A refusal is an answer, for all ranks."""
    run_dir = Path(config.directory)
    try:
        stack.enter_context(RunOwner(run_dir))
        attempt = next_attempt(run_dir)
        start = decide_start(run_dir / "checkpoints", config, corpus_hash(rows.index))
        # A finished run stays as it is: this attempt describes nothing and leaves no log.
        finished = start.step >= config.train.steps and _has_finished(run_dir, config.train.steps)
        if not finished:
            described = str(device) if device.type == "cpu" else torch.cuda.get_device_name(device)
            HealthDir(run_dir, attempt).prepare()
            write_description(run_dir, config, launch, threads=torch.get_num_threads(), kernels=kernels, device=described)
        return {"attempt": attempt, "start": asdict(start), "finished": finished}
    except UserError as error:
        return {"refused": str(error), "code": int(error.exit_code)}


def _has_finished(run_dir: Path, steps: int) -> bool:
    return any(e.get("event") == "finish" and e.get("step") == steps for e in read_events(run_dir / "events.jsonl"))


def _rebuilt(decision: dict[str, Any], *, is_echo: bool) -> UserError:
    error = UserError(decision["refused"])
    error.exit_code = ExitCode(decision["code"])
    error.is_echo = is_echo
    return error


@contextlib.contextmanager
def _agreed(ctx: ParallelContext, what: str) -> Iterator[None]:
    """What may fail on one rank only (a file that one node does not see) fails on all: nobody is left waiting in a collective."""
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
    (code,) = all_reduce_max([error.exit_code if error is not None else 0], ctx.world, ctx.device)
    if error is not None:
        raise error
    if code:
        echo = UserError(f"{what} failed on another rank; its message is the cause")
        echo.exit_code, echo.is_echo = ExitCode(int(code)), True
        raise echo


@contextlib.contextmanager
def _rank_log(run_dir: Path, attempt: int, rank: int) -> Iterator[None]:
    """logs/attempt-N/rank-R.log: crashes of the interpreter, and on SIGUSR2 the stacks of all threads."""
    directory = run_dir / "logs" / f"attempt-{attempt}"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / f"rank-{rank}.log", "a", encoding="utf-8") as f:
        f.write(f"rank {rank} on {socket.gethostname()}, process {os.getpid()}\n")
        f.flush()
        faulthandler.enable(f)
        try:
            yield
        except BaseException:
            traceback.print_exc(file=f)
            raise
        finally:
            faulthandler.disable()


def _headline(config: RunConfig, launch: Launch, chosen: Mapping[str, Impl], *, deepspeed: bool) -> str:
    engine = f"deepspeed, ZeRO-{config.parallel.zero}" if deepspeed else "plain"
    ops: dict[str, dict[str, None]] = {}  # name -> ops of which this run calls a function so named, in their order
    for function, impl in chosen.items():
        if function in CALLED or function in LAYOUT_TABLES:
            ops.setdefault(impl.name, {})[impl.op] = None
    kernels = "; ".join(f"{name}: {', '.join(taken)}" for name, taken in ops.items())
    return (
        f"{config.name}: {launch.world_size} rank(s) by {launch.launcher}, {torch.get_num_threads()} thread(s) each, "
        f"engine {engine}, {config.precision}; kernels {kernels}"
    )


def _say_stopped_at_once(run_dir: Path, launch: Launch, progress: dict[str, Any], watch: Watch | None) -> None:
    if watch is not None:
        reason = "second Ctrl-C: stopped without saving"
        stopped = Failure(
            code=ExitCode.INTERRUPTED,
            reason=reason,
            rank=launch.rank,
            host=socket.gethostname(),
            step=progress["step"],
            teller=launch.rank,
        )
        if watch.claim(stopped) is not stopped:
            return  # another rank's second Ctrl-C came first and says it
        write_exit(
            run_dir, code=stopped.code, reason=reason, rank=launch.rank, host=stopped.host, step=stopped.step, attempt=progress["attempt"]
        )  # fmt: skip
    elif not launch.is_main:
        return
    print("stopped at once; the last checkpoint is where the run goes on", file=sys.stderr, flush=True)
