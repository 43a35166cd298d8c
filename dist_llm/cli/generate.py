"""Continue a prompt with a trained run.

  dist-llm generate runs/quickstart --prompt 'def main('
  dist-llm generate runs/quickstart --prompt 'import ' --top-p 0.9 --temperature 0.7 --seed 3
  dist-llm generate runs/quickstart --prompt-file - --beams 4 --length-penalty 0.6 < prompt.txt
  dist-llm generate runs/quickstart --prompt 'class ' --num-samples 4 --json

RUN is a run directory, as `dist-llm train` wrote it; the newest valid checkpoint is taken unless --step names one. The text goes to
stdout, the prompt first; everything else goes to stderr. The same command writes the same text. docs/generate.md says more.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_llm.utils.errors import ConfigError, DataError, ExitCode, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dist_llm.generate.load import TrainedRun
    from dist_llm.generate.sample import Sampling
    from dist_llm.generate.vocabulary import Continuation

__all__ = ["add_arguments", "run"]

TEMPERATURE = 0.8
MAX_THREADS = 1024  # far more crash while they are started, before anything could say why
MAX_LENGTH_PENALTY = 10.0  # far beyond any use; larger exponents overflow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``dist-llm generate`` takes."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue; '' begins a document")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="read the prompt from FILE, or from stdin if it is -; taken as it is, last newline and all"
    )
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="stop here if the text has not ended (default 200)")
    parser.add_argument("--temperature", type=float, metavar="T", help=f"below 1 safer, above 1 wilder (default {TEMPERATURE})")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens whose probability reaches P")
    parser.add_argument("--greedy", action="store_true", help="the most probable token each time")
    parser.add_argument("--beams", type=int, metavar="B", help="beam search with B hypotheses")
    parser.add_argument(
        "--length-penalty", type=float, metavar="A", help="with --beams: rank by logprob / ((5 + tokens) / 6)^A (default 0)"
    )
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="continuations; with --beams the N best (default 1)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the random numbers (default 0)")
    parser.add_argument("--step", type=int, metavar="N", help="take the checkpoint of this step (default: the newest valid one)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model, when the run's corpus is gone")
    parser.add_argument("--no-cache", action="store_true", help="read the whole context for each token: slow, for comparison")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: one for each 25 million parameters, at most all cores)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, docs/generate.md")


def run(args: argparse.Namespace) -> int:
    """Write the continuations and return the exit code."""
    _check(args)
    prompt = args.prompt if args.prompt is not None else _read_prompt(args.prompt_file)

    from dist_llm.generate.context import check_prompt
    from dist_llm.generate.load import load_run
    from dist_llm.generate.sample import Sampling

    sampling = Sampling(
        temperature=TEMPERATURE if args.temperature is None else args.temperature, top_k=args.top_k, top_p=args.top_p, greedy=args.greedy
    )
    trained = load_run(args.run, step=args.step, tokenizer_file=args.tokenizer, threads=args.threads)
    prompt_ids = [trained.tokenizer.bos_id, *trained.tokenizer.encode(prompt).tolist()]
    check_prompt(prompt_ids, trained.config.model.max_seq_len)
    for note in [*trained.notes, *_beyond_training(trained, len(prompt_ids) + args.max_new_tokens)]:
        print(f"dist-llm generate: {note}", file=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where a character cannot be encoded, a question mark stands for it

    try:
        continuations, tokens_per_s = _write(args, trained, sampling, prompt, prompt_ids)
    except BrokenPipeError:
        raise  # the reader has seen enough: no failure
    except OSError as error:
        with contextlib.suppress(OSError):  # what waits in the buffer would fail once more at exit, with an exit code of its own
            sys.stdout.close()
        raise StorageError(f"cannot write the text to stdout: {error.strerror}; free some space or send it elsewhere") from error
    said = f"{_summary(continuations[0])}, " if len(continuations) == 1 else ""
    print(f"dist-llm generate: {said}{tokens_per_s:.1f} tokens/s, {trained.checkpoint}", file=sys.stderr)
    return ExitCode.DONE


def _write(
    args: argparse.Namespace, trained: TrainedRun, sampling: Sampling, prompt: str, prompt_ids: list[int]
) -> tuple[list[Continuation], float]:
    """Generate, and put it on stdout; the continuations, and tokens a second."""
    is_streamed = not args.json and args.beams is None and args.num_samples == 1
    started = time.perf_counter()
    generate = _stream if is_streamed else _collect
    continuations = generate(args, trained, sampling, prompt, prompt_ids)
    tokens_per_s = sum(len(c.tokens) for c in continuations) / (time.perf_counter() - started)
    if args.json:
        print(json.dumps(_answer(trained, prompt, continuations, tokens_per_s)))
    elif not is_streamed:
        for number, continuation in enumerate(continuations, start=1):
            if len(continuations) > 1:
                print(f"--- {number} of {len(continuations)}: {_summary(continuation)}")
            print(prompt + trained.tokenizer.decode(continuation.tokens))
    sys.stdout.flush()  # here a reader that has gone away, or a full disk, is still noticed as one
    return continuations, tokens_per_s


def _check(args: argparse.Namespace) -> None:
    """What is wrong with the command line alone, before anything is loaded."""
    counts = {"--max-new-tokens": args.max_new_tokens, "--num-samples": args.num_samples, "--beams": args.beams, "--threads": args.threads}
    for flag, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value} must be at least 1")
    if args.threads is not None and args.threads > MAX_THREADS:
        raise ConfigError(f"--threads {args.threads} must be at most {MAX_THREADS}; more than the machine has cores only slows it down")
    if args.step is not None and args.step < 0:
        raise ConfigError(f"--step {args.step} must be 0 or more: the number of steps the checkpoint was saved after")
    drawing = {"--temperature": args.temperature, "--top-k": args.top_k, "--top-p": args.top_p, "--seed": args.seed}
    given = [flag for flag, value in drawing.items() if value is not None]
    for flag, is_on in {"--greedy": args.greedy, "--beams": args.beams is not None}.items():
        if is_on and given:
            raise ConfigError(f"{flag} draws no random numbers, so {' and '.join(given)} would do nothing; leave out one side")
    if args.greedy and args.beams is not None:
        raise ConfigError("--greedy and --beams exclude each other; --beams 1 is greedy")
    if args.greedy and args.num_samples > 1:
        raise ConfigError(
            f"--greedy writes one text: {args.num_samples} samples would be the same; leave out --num-samples, or use --beams"
        )
    if args.beams is not None and args.num_samples > args.beams:
        raise ConfigError(f"--num-samples {args.num_samples} is more than --beams {args.beams} can give; use at least as many beams")
    if args.length_penalty is not None:
        if args.beams is None:
            raise ConfigError("--length-penalty orders the results of --beams; give --beams B as well, or leave it out")
        if not abs(args.length_penalty) <= MAX_LENGTH_PENALTY:
            raise ConfigError(
                f"--length-penalty {args.length_penalty} must be between -{MAX_LENGTH_PENALTY:g} and {MAX_LENGTH_PENALTY:g}; 0.6 is usual"
            )


def _read_prompt(file: str) -> str:
    name = "from stdin" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the prompt {name}: {error.strerror}; name a text file, or give the text with --prompt") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the prompt {name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it first, for example with iconv"
        ) from error


def _beyond_training(trained: TrainedRun, num_tokens: int) -> list[str]:
    trained_len, model_len = trained.config.data.seq_len, trained.config.model.max_seq_len
    if min(num_tokens, model_len) <= trained_len:
        return []
    return [
        f"the context may grow to {min(num_tokens, model_len)} tokens, the rows the model learned from had {trained_len} (data.seq_len)"
    ]


def _continue(
    args: argparse.Namespace,
    trained: TrainedRun,
    sampling: Sampling,
    prompt_ids: list[int],
    *,
    on_tokens: Callable[[dict[int, int]], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[Continuation]:
    from dist_llm.generate.beam import beam_search
    from dist_llm.generate.sample import sample
    from dist_llm.generate.vocabulary import vocabulary_of

    model = trained.model
    vocabulary = vocabulary_of(trained.tokenizer, model.config.vocab_size, model.head_weight.device)
    if args.beams is not None:
        return beam_search(
            model,
            prompt_ids,
            vocabulary,
            beams=args.beams,
            max_new_tokens=args.max_new_tokens,
            alpha=args.length_penalty or 0.0,
            num_results=args.num_samples,
            use_cache=not args.no_cache,
            on_step=on_step,
        )
    return sample(
        model,
        prompt_ids,
        vocabulary,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        num_samples=args.num_samples,
        seed=args.seed or 0,
        use_cache=not args.no_cache,
        on_step=on_step,
        on_tokens=on_tokens,
    )


def _stream(args: argparse.Namespace, trained: TrainedRun, sampling: Sampling, prompt: str, prompt_ids: list[int]) -> list[Continuation]:
    from dist_llm.generate.stream import TextStream

    sys.stdout.write(prompt)
    sys.stdout.flush()
    stream = TextStream(trained.tokenizer, sys.stdout)
    continuations = _continue(args, trained, sampling, prompt_ids, on_tokens=lambda written: stream.write(written[0]))
    stream.close()
    print()
    return continuations


def _collect(args: argparse.Namespace, trained: TrainedRun, sampling: Sampling, prompt: str, prompt_ids: list[int]) -> list[Continuation]:
    from dist_llm.generate.stream import StepProgress

    del prompt  # printed later, with each continuation
    progress = StepProgress(args.max_new_tokens)
    try:
        return _continue(args, trained, sampling, prompt_ids, on_step=progress.update)
    finally:
        progress.close()


def _answer(trained: TrainedRun, prompt: str, continuations: list[Continuation], tokens_per_s: float) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "continuations": [
            {"text": trained.tokenizer.decode(c.tokens), "tokens": list(c.tokens), "logprob": c.logprob, "finished": c.finished}
            for c in continuations
        ],
        "tokens_per_s": tokens_per_s,
        "checkpoint": str(trained.checkpoint),
    }


def _summary(continuation: Continuation) -> str:
    end = "ended by the model" if continuation.finished else "cut there"
    return f"{len(continuation.tokens)} tokens, {end}, logprob {continuation.logprob:.2f}"
