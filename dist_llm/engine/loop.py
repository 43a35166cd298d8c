"""The training loop: steps, evaluation, checkpoints, and an orderly end whatever ends it.

Everything the next step depends on is the engine's state and one number, ``next_sample``; both are in a checkpoint, so a run
that goes on from one takes the steps it would have taken.
"""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Any

import torch

from dist_llm.checkpoint.save import prune, save_checkpoint
from dist_llm.comm.collectives import all_reduce_max, barrier
from dist_llm.comm.context import ParallelContext
from dist_llm.comm.ledger import CommLedger
from dist_llm.config.schema import RunConfig
from dist_llm.data.rows import RowDataset
from dist_llm.engine.base import Engine
from dist_llm.engine.batches import StepBatches
from dist_llm.engine.held_out import evaluate_held_out
from dist_llm.engine.record import Recorder
from dist_llm.engine.run_dir import Start, corpus_hash, versions
from dist_llm.engine.step import StepResult, Stopped, train_step
from dist_llm.engine.stop import StopFlag
from dist_llm.optim.schedule import learning_rate
from dist_llm.parallel.timeline import TimelineLog
from dist_llm.planning.count import flops_per_token
from dist_llm.utils.errors import ExitCode, NumericalError, StorageError

__all__ = ["Loop"]


class Loop:
    """One attempt of a run, from ``start`` to the last step or to a stop.

    Args:
        config: the run.
        ctx: where this rank stands.
        engine: with its state in place.
        train_rows: training split.
        eval_rows: validation split, or None when the corpus has none.
        start: where to begin.
        recorder: who is told.
        ledger: counts and times communication; must have been entered before the engine was built.
        peak_flops: of all devices together, for MFU; None when unknown.
        progress: its "step" is kept at the number of steps taken, for whoever has to say where a run ended.
    """

    def __init__(
        self,
        config: RunConfig,
        ctx: ParallelContext,
        engine: Engine,
        *,
        train_rows: RowDataset,
        eval_rows: RowDataset | None,
        start: Start,
        recorder: Recorder,
        ledger: CommLedger,
        peak_flops: float | None,
        progress: dict[str, Any] | None = None,
    ) -> None:
        self.step = start.step  # optimiser steps taken
        self._progress = progress if progress is not None else {}
        self._next_sample = start.next_sample
        self._tokens = start.tokens
        self._saved_step = start.step if start.checkpoint is not None else -1
        self._config = config
        self._ctx = ctx
        self._engine = engine
        self._batches = StepBatches(train_rows, config, ctx)
        self._corpus = corpus_hash(train_rows.index)
        self._tokens_per_byte = train_rows.num_eval_targets / train_rows.text_bytes
        self._eval_rows = eval_rows
        self._recorder = recorder
        self._ledger = ledger
        self._timeline = TimelineLog(config, ctx, start_step=start.step)
        self._peak_flops = peak_flops
        self._flops_per_token = flops_per_token(config.model, config.data.seq_len)

    def run(self, stop: StopFlag) -> int:
        """Train to the end, or until the ranks agree to stop; the exit code.

        Raises:
            NumericalError: the loss or the gradient norm is not finite. The last checkpoint is from before.
        """
        config = self._config
        while self.step < config.train.steps:
            self._ledger.take()
            self._ledger.take_counts()
            lr = learning_rate(self.step + 1, optim=config.optim, steps=config.train.steps)
            result = train_step(self._engine, self._ctx, self._batches, next_sample=self._next_sample, lr=lr, stop_code=stop.code)
            if isinstance(result, Stopped):
                return self._stop(result.code)
            self.step += 1
            self._progress["step"] = self.step
            self._next_sample += config.train.batch_size
            self._tokens += result.num_tokens
            self._record(result, lr)
            self._timeline.after_step(self.step, self._engine.pipeline)  # the plain engine has none
            self._require_finite(result)
            last = self.step == config.train.steps
            if not last and config.eval.every and self.step % config.eval.every == 0:
                self._evaluate(config.eval.rows)
            if not last and config.checkpoint.every and self.step % config.checkpoint.every == 0:
                self._save()
        # Saved before the last evaluation: a kill during it costs the evaluation, not the run.
        if self._saved_step != self.step:
            self._save()
        self._evaluate(None)
        self._recorder.event("finish", step=self.step, tokens=self._tokens)
        barrier(self._ctx.world, self._ctx.device)
        return ExitCode.DONE

    def _stop(self, code: int) -> int:
        if self._saved_step != self.step:
            self._save()
        self._recorder.event("stop", step=self.step, code=code)
        again = "start the same command again to go on" if code == ExitCode.INTERRUPTED else "asking to be requeued"
        self._recorder.note(f"stopped after step {self.step} of {self._config.train.steps}, saved; {again} (exit {code})")
        # The first rank to exit brings the others a SIGTERM from the launcher: they leave together.
        barrier(self._ctx.world, self._ctx.device)
        return code

    def _record(self, result: StepResult, lr: float) -> None:
        rate = result.num_tokens / result.step_s
        # The ranks wait for one another, so the slowest in communication waited least: every rank's own figures differ,
        # those of the main rank are shown. Memory is that of the fullest.
        comm_s, counts = self._ledger.take(), self._ledger.take_counts()
        (memory,) = all_reduce_max([float(_memory_bytes(self._ctx.device))], self._ctx.world, self._ctx.device)
        record: dict[str, Any] = {
            "kind": "train",
            "step": self.step,
            "loss": result.loss,
            "bits_per_byte": result.loss / math.log(2) * self._tokens_per_byte,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": self._tokens,
            "tokens_per_s": rate,
            "step_s": result.step_s,
            "data_s": result.data_s,
            "comm_s": comm_s,
            "memory_bytes": int(memory),
        }
        if self._peak_flops is not None:
            record["mfu"] = rate * self._flops_per_token / self._peak_flops
        if counts:
            record["comm_bytes"] = round(sum(traffic.wire_bytes for traffic in counts.values()))
            for (group, _), traffic in sorted(counts.items()):
                record[f"comm_bytes_{group}"] = record.get(f"comm_bytes_{group}", 0) + round(traffic.wire_bytes)
        self._recorder.metrics(record)

    def _require_finite(self, result: StepResult) -> None:
        for what, value in (("loss", result.loss), ("gradient norm", result.grad_norm)):
            if not math.isfinite(value):
                raise NumericalError(
                    f"the {what} of step {self.step} is {value}; the last checkpoint is of step {max(0, self._saved_step)}. "
                    "Lower optim.lr, lengthen optim.warmup_steps or set optim.clip_norm, and start again"
                )

    def _evaluate(self, limit: int | None) -> None:
        if self._eval_rows is None:
            return
        held_out = evaluate_held_out(self._engine, self._ctx, self._eval_rows, self._config, limit=limit)
        self._recorder.metrics(
            {
                "kind": "eval",
                "step": self.step,
                "loss": held_out.loss,
                "bits_per_byte": held_out.bits_per_byte,
                "tokens": held_out.tokens,
                "bytes": round(held_out.bytes),
                "eval_s": held_out.eval_s,
            }
        )

    def _save(self) -> None:
        root = Path(self._config.directory) / "checkpoints"
        failure: StorageError | None = None
        try:
            self._write_checkpoint(root)
        except StorageError as error:
            failure = error
        # Only one rank writes, so only one knows: without this the others would learn of a full disk from its silence.
        (failed,) = all_reduce_max([failure is not None], self._ctx.world, self._ctx.device)
        if failed:
            echo = StorageError(f"the main rank could not save step {self.step}")
            echo.is_echo = True
            raise failure or echo
        self._saved_step = self.step

    def _write_checkpoint(self, root: Path) -> None:
        directory = save_checkpoint(
            root,
            self._engine.state(),
            step=self.step,
            next_sample=self._next_sample,
            tokens=self._tokens,
            config=self._config.model_dump(mode="json"),
            corpus=self._corpus,
            versions=versions(),
            writes=self._ctx.is_main,
        )
        if self._ctx.is_main:
            prune(root, self._config.checkpoint.keep)
        self._recorder.event("checkpoint", step=self.step, directory=directory.name)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
