#!/usr/bin/env python3
"""The main job, end to end, on this machine: corpus, tokenizer, size for a time budget, training on two ranks, evaluation, sample, report.

Every step is a command that can be typed by hand; it is printed before it runs. A second run reuses what is still valid: the
corpus, the plan made for the same budget on the same machine, and the checkpoints of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dist_llm import __version__
from dist_llm.data.index import load_index
from dist_llm.data.text import iter_text
from dist_llm.evaluate.baselines import byte_unigram_entropy, lzma_bits_per_byte
from dist_llm.planning.budget import SpeedPoint, choose_size
from dist_llm.report.metrics import read_metrics
from dist_llm.utils.errors import ExitCode, UserError
from dist_llm.utils.files import write_atomic, write_json

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
SEQ_LEN = 256
BATCH_SIZE = 16
PROMPT = "def read_file(path):\n"


def main() -> int:
    """Run the six steps; stop with the exit code of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="time to train (default 2)")
    parser.add_argument("--source", nargs="+", default=["stdlib"], help="text to train on (default: this Python's standard library)")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--work", type=Path, default=Path("quickstart"), help="directory for corpus and plan (default quickstart)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"), help="run directory (default runs/quickstart)")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    start = time.monotonic()
    try:
        quickstart(arguments)
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return int(error.exit_code)
    except subprocess.CalledProcessError as error:
        print(f"quickstart: stopped, `{shlex.join(map(str, error.cmd))}` ended with {error.returncode}", file=sys.stderr)
        return int(error.returncode)
    except KeyboardInterrupt:
        print("quickstart: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return ExitCode.INTERRUPTED
    print(f"quickstart: done in {time.monotonic() - start:.0f} s; open {arguments.run_dir / 'report.html'}")
    return ExitCode.DONE


def quickstart(arguments: argparse.Namespace) -> None:
    """The six steps."""
    work, run_dir, corpus = arguments.work, arguments.run_dir, arguments.work / "corpus"
    work.mkdir(parents=True, exist_ok=True)
    say(1, "corpus: text to tokens, sharded and hashed")
    dist_llm(
        "data",
        "prepare",
        "--source",
        *arguments.source,
        "--out",
        corpus,
        "--vocab-size",
        arguments.vocab_size,
        "--val-fraction",
        0.05,
        "--force",
    )

    say(2, f"speed of this machine, {RANKS} ranks, and the size it can train in {arguments.minutes:g} min")
    plan = make_plan(arguments, corpus)
    print(plan["reason"] + ".")

    say(3, f"training on {RANKS} ranks under the deepspeed launcher, ZeRO-1, bf16")
    set_other_run_aside(run_dir, plan)
    launch("train", work / "config.yaml")

    say(4, "held-out bits per byte beside what needs no model")
    write_results(run_dir, corpus, plan)

    say(5, "a sample continuation")
    write_sample(run_dir)

    say(6, "report")
    dist_llm("report", run_dir)


def make_plan(arguments: argparse.Namespace, corpus: Path) -> dict[str, Any]:
    """The size for the budget: the plan of an earlier run where nothing it depends on has changed, else a new one."""
    index = load_index(corpus)
    depends_on = {
        "minutes": arguments.minutes,
        "corpus": index.fingerprint,
        "cores": len(os.sched_getaffinity(0)),
        "ranks": RANKS,
        "versions": [__version__, version("torch"), version("deepspeed")],
    }
    path = arguments.work / "plan.json"
    if path.exists():
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if plan.get("depends_on") == depends_on and (arguments.work / "config.yaml").exists():
            print(f"reusing {path}")
            return plan
    vocab_size = index.tokenizer.vocab_size
    speed_file = arguments.work / "speed.json"
    launch("bench", "speed", "--vocab-size", vocab_size, "--seq-len", SEQ_LEN, "--batch-size", BATCH_SIZE, "--out", speed_file)
    points = [SpeedPoint(**point) for point in json.loads(speed_file.read_text(encoding="utf-8"))["points"]]
    choice = choose_size(points, budget_s=60 * arguments.minutes, vocab_size=vocab_size, seq_len=SEQ_LEN, batch_size=BATCH_SIZE)
    shape = choice.model
    passes = choice.tokens / index.split("train").stream_tokens
    config = {
        "extends": os.path.relpath("configs/quickstart.yaml", arguments.work),
        "run_dir": str(arguments.run_dir),
        "model": {
            "vocab_size": vocab_size,
            "d_model": shape.d_model,
            "num_layers": shape.num_layers,
            "num_heads": shape.num_heads,
            "max_seq_len": SEQ_LEN,
        },
        "data": {"path": str(corpus), "seq_len": SEQ_LEN},
        "train": {"steps": choice.steps, "batch_size": BATCH_SIZE, "micro_batch_size": BATCH_SIZE // RANKS},
        "optim": {"warmup_steps": max(1, min(50, choice.steps // 10))},
    }
    write_atomic(arguments.work / "config.yaml", "# Written by tools/quickstart.py\n" + yaml.safe_dump(config, sort_keys=False))
    plan = {
        "params": choice.params,
        "tokens": choice.tokens,
        "tokens_per_param": choice.tokens / choice.params,
        "steps": choice.steps,
        "expected_s": choice.expected_s,
        "reason": f"{choice.reason}. The corpus holds {index.split('train').stream_tokens:,} training tokens: {passes:.1f} passes over it",
        "depends_on": depends_on,
    }
    write_json(path, plan)
    return plan


def set_other_run_aside(run_dir: Path, plan: dict[str, Any]) -> None:
    """A run of another plan keeps its results under another name."""
    marker = run_dir / "quickstart-plan.json"
    if run_dir.exists() and (not marker.exists() or json.loads(marker.read_text(encoding="utf-8")) != plan):
        number = next(n for n in range(1, 10_000) if not run_dir.with_name(f"{run_dir.name}-{n}").exists())
        aside = run_dir.with_name(f"{run_dir.name}-{number}")
        run_dir.rename(aside)
        print(f"{run_dir} holds a run of another plan: moved to {aside}")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(marker, plan)


def write_results(run_dir: Path, corpus: Path, plan: dict[str, Any]) -> None:
    """results.json: the last held-out figures and the baselines of the same bytes."""
    text = b"".join(data for _, data in iter_text(corpus, "val"))
    evaluations = [r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "eval"]
    last = evaluations[-1]
    results = {
        "eval": {
            "bits_per_byte": last["bits_per_byte"],
            "loss": last["loss"],
            "bytes": len(text),
            "documents": load_index(corpus).split("val").documents,
        },
        "baselines": {"byte_unigram_entropy": byte_unigram_entropy(text), "lzma_bits_per_byte": lzma_bits_per_byte(text)},
        "plan": {key: plan[key] for key in ("params", "tokens", "tokens_per_param", "reason")},
    }
    write_json(run_dir / "results.json", results)
    baselines = results["baselines"]
    print(f"held-out text           {len(text):,} bytes of {results['eval']['documents']} files the model never saw")
    print(f"byte-unigram entropy    {baselines['byte_unigram_entropy']:.3f} bits per byte")
    print(f"lzma -9                 {baselines['lzma_bits_per_byte']:.3f} bits per byte")
    print(f"this model              {last['bits_per_byte']:.3f} bits per byte")
    print(f"tokens per parameter    {plan['tokens_per_param']:.1f} (all {plan['params']:,} parameters, embedding included)")


def write_sample(run_dir: Path) -> None:
    """A sampled continuation, shown and kept for the report."""
    options = ["--max-new-tokens", 160, "--temperature", 0.7, "--top-p", 0.95, "--seed", 1]
    answer = json.loads(dist_llm("generate", run_dir, "--prompt", PROMPT, *options, "--json", capture=True))
    continuation = answer["continuations"][0]["text"]
    print(PROMPT + continuation)
    path = run_dir / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["sample"] = {"prompt": PROMPT, "continuation": continuation}
    write_json(path, results)


def say(number: int, text: str) -> None:
    """Head of a step."""
    print(f"\n[{number}/6] {text}", flush=True)


def dist_llm(*words: object, capture: bool = False) -> str:
    """Run a verb in this environment."""
    command = [str(Path(sys.executable).with_name("dist-llm")), *map(str, words)]
    return _run(command, f"dist-llm {shlex.join(map(str, words))}", capture=capture)


def launch(*words: object) -> None:
    """Run a verb on both ranks under the deepspeed launcher."""
    launcher = Path(sys.executable).with_name("deepspeed")
    shown = shlex.join(["deepspeed", "--num_gpus", str(RANKS), "--module", "dist_llm", *map(str, words)])
    quiet = ["--master_port", str(free_port()), "--log_level", "error"]
    _run([str(launcher), "--num_gpus", str(RANKS), *quiet, "--module", "dist_llm", *map(str, words)], shown)


def free_port() -> int:
    """A port nobody listens on: two quickstarts on one machine must not meet."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


def _run(command: list[str], shown: str, *, capture: bool = False) -> str:
    print(f"$ {shown}", flush=True)
    # The environment's own programs first: the launcher starts `python` from PATH.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    if not Path("/dev/nvidiactl").exists():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # what deepspeed finds by itself too, with a warning from every process
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE if capture else None, env=environment)
    interrupted = False
    while True:
        try:
            output, _ = process.communicate()
            break
        except KeyboardInterrupt:
            # The terminal has interrupted the command as well: let it save and say so. A second Ctrl-C reaches it too.
            if not interrupted:
                print("quickstart: waiting for the command to save; Ctrl-C again stops it at once", file=sys.stderr)
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return output or ""


if __name__ == "__main__":
    if shutil.which("python3") is None:
        sys.exit("quickstart: no python3 on PATH")
    sys.exit(main())
