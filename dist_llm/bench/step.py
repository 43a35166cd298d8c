"""``bench step``: one rank under our loop against the same model elsewhere, step by step in turns.

6 layers x 384, 6 heads, LayerNorm, gelu, learned positions, tied embedding, batch 12 x 256, bf16. Ours goes through
``engine.step.train_step`` and writes metrics.jsonl, as `dist-llm train` does, with the plain engine and with DeepSpeed ZeRO-1.
The peers: plain PyTorch, eager and under ``torch.compile``, Hugging Face's GPT-2, and DeepSpeed ZeRO-0 around the plain model.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dist_llm.bench.peers.gpt import PlainGPT, peer_tensors
from dist_llm.bench.peers.steps import AUTOCAST, BF16_WEIGHTS, TITLES, PeerStep, build_peers
from dist_llm.comm.context import ParallelContext
from dist_llm.config.schema import DataConfig, KernelsConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from dist_llm.data.rows import Batch
from dist_llm.engine.base import Engine, LossModule
from dist_llm.engine.batches import StepBatches, to_device
from dist_llm.engine.build import build_engine, build_model, choose_ops
from dist_llm.engine.launch import close_context, open_context, tune_allocator
from dist_llm.engine.peak import peak_flops
from dist_llm.engine.ranks import read_launch
from dist_llm.engine.step import StepResult, train_step
from dist_llm.kernels.impl import Impl
from dist_llm.planning.count import flops_per_token
from dist_llm.report.metrics import MetricsWriter

__all__ = ["RandomRows", "race_step", "step_as_text", "step_config"]

ROWS, LENGTH = 12, 256
WARM_UP = 2
# Rounding to 8 bits leaves gradients of these six layers about 0.01 from float64.
MAX_GRADIENT_ERROR = 0.03
# Measured: 1.5e-4. A first update that was a quarter too small made 2e-2.
MAX_LOSS_SPREAD = 2e-3


class RandomRows:
    """Rows of random tokens, the same for everybody: data loading is not what this race is about, but it is in our time."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def batch(self, numbers: range) -> Batch:
        """The rows with these sample numbers."""
        stream = np.random.default_rng(numbers.start).integers(0, self.vocab_size, (len(numbers), LENGTH + 1))
        positions = np.broadcast_to(np.arange(LENGTH), (len(numbers), LENGTH))
        return Batch(
            tokens=np.ascontiguousarray(stream[:, :-1]),
            targets=np.ascontiguousarray(stream[:, 1:]),
            doc_ids=np.zeros((len(numbers), LENGTH), np.int32),
            positions=positions,
        )


def step_config(*, engine: str, vocab_size: int = 65, kernels: KernelsConfig | None = None) -> RunConfig:
    """The config of the race."""
    return RunConfig(
        precision="bf16",
        model=ModelConfig(
            vocab_size=vocab_size, d_model=384, num_layers=6, num_heads=6, max_seq_len=LENGTH, norm="layer_norm", position="learned",
            activation="gelu", bias=True, tie_embeddings=True,
        ),
        data=DataConfig(seq_len=LENGTH),
        train=TrainConfig(steps=10_000, batch_size=ROWS, micro_batch_size=ROWS, engine=engine),
        optim=OptimConfig(lr=1e-4),
        parallel=ParallelConfig(zero=1),
        kernels=kernels or KernelsConfig(),
    )  # fmt: skip


def race_step(*, threads: int | None, rounds: int, profile: bool = False, tuned_malloc: bool = True) -> dict[str, Any]:
    """Run the race.

    Args:
        threads: CPU threads; None: all cores.
        rounds: timed rounds; in each, every contestant takes one step. Medians are reported.
        profile: also say where the time of our plain step goes.
        tuned_malloc: keep freed memory in the process, as `dist-llm train` does; for every contestant alike.
    """
    if tuned_malloc and not torch.cuda.is_available():
        tune_allocator()
    ctx = open_context(read_launch({}), needs_process_group=True, threads=threads)
    try:
        with (
            tempfile.TemporaryDirectory() as directory,
            MetricsWriter(Path(directory) / "metrics.jsonl") as metrics,
            _inductor_cache(Path(directory) / "inductor"),
        ):
            return _race(ctx, metrics, rounds=rounds, profile=profile)
    finally:
        close_context()


@contextlib.contextmanager
def _inductor_cache(directory: Path) -> Iterator[None]:
    """An empty cache: the first step of torch.compile is that of a user's first run."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _race(ctx: ParallelContext, metrics: MetricsWriter, *, rounds: int, profile: bool) -> dict[str, Any]:
    plain_config, deepspeed_config = step_config(engine="plain"), step_config(engine="deepspeed")
    chosen = choose_ops(plain_config, ctx)
    weights = build_model(plain_config, chosen).initial_weights(plain_config.seed)
    rows: Any = RandomRows(plain_config.model.vocab_size)

    ours = build_engine(plain_config, ctx, chosen, None)
    # The answer alone belongs on stdout, which DeepSpeed's logger takes when it is imported.
    with contextlib.redirect_stdout(sys.stderr):
        with_deepspeed = build_engine(deepspeed_config, ctx, chosen, None)
    peers, absent = build_peers(plain_config, weights, ctx.device)
    batches = StepBatches(rows, plain_config, ctx)

    def through_loop(engine: Engine) -> Callable[[int], float]:
        def step(n: int) -> float:
            result = train_step(engine, ctx, batches, next_sample=n * ROWS, lr=1e-4, stop_code=0)
            assert isinstance(result, StepResult)
            metrics.write({"kind": "train", "step": n, "loss": result.loss, "grad_norm": result.grad_norm})
            return result.loss

        return step

    truth, errors = _gradients_of_first_step(plain_config, chosen, rows, ctx.device)
    checked_s: dict[str, float] = {}

    def by_hand(name: str, peer: PeerStep) -> Callable[[int], float]:
        def step(n: int) -> float:
            samples = range(n * ROWS, (n + 1) * ROWS)
            batch = to_device(rows.batch(samples), ctx.device, document_mask=False, samples=samples)
            loss = peer.backward(batch.tokens, batch.targets)
            if n == 0:
                begin = time.perf_counter()
                errors[name] = _distance(peer.gradients(), truth)
                checked_s[name] = time.perf_counter() - begin
            peer.update()
            return float(loss)

        return step

    contestants = {
        "ours_plain": through_loop(ours),
        "ours_deepspeed_zero1": through_loop(with_deepspeed),
        **{name: by_hand(name, peers[name]) for name in TITLES if name in peers},
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    first_step: dict[str, float] = {}
    losses: dict[str, list[float]] = {name: [] for name in contestants}
    for n in range(WARM_UP + rounds):
        # A-B-C-D, then D-C-B-A: what a neighbour on the machine does hits all of them alike.
        order = list(contestants) if n % 2 == 0 else list(contestants)[::-1]
        for name in order:
            wall, start = time.perf_counter(), _now(ctx)
            losses[name].append(contestants[name](n))
            times[name].append(_now(ctx) - start)
            if n == 0:
                # Wall time: a compiler works in processes of its own.
                first_step[name] = time.perf_counter() - wall - checked_s.get(name, 0.0)
        check_same_function(errors, losses)
    spread = max(max(at_once) - min(at_once) for at_once in zip(*losses.values(), strict=True))
    ms = {name: 1000 * median(values[WARM_UP:]) for name, values in times.items()}
    flops = flops_per_token(plain_config.model, LENGTH) * ROWS * LENGTH
    peak = peak_flops(ctx.device, torch.bfloat16)

    def best(names: tuple[str, ...]) -> str:
        return min((name for name in names if name in ms), key=lambda name: ms[name])

    best_autocast, best_masters = best(AUTOCAST), best(BF16_WEIGHTS)
    # The second to compile finds some of the first one's work in the cache; the comparison is with the sooner.
    fastest_compile = min(first_step[name] for name in ("compile_autocast", "compile_bf16_masters"))
    answer: dict[str, Any] = {
        "case": "step",
        "ours_ms": ms["ours_plain"],
        "ours_deepspeed_zero1_ms": ms["ours_deepspeed_zero1"],
        "peers": {name: ms[name] for name in TITLES if name in ms},
        "absent": absent,
        "best_peer": best_autocast,
        "best_bf16_peer": best_masters,
        # Against the usual way, fp32 weights under autocast; and against bf16 weights with masters.
        "ratio": ms[best_autocast] / ms["ours_plain"],
        "ratio_bf16": ms[best_masters] / ms["ours_plain"],
        "ratio_deepspeed_zero1": min(ms[best_autocast], ms[best_masters]) / ms["ours_deepspeed_zero1"],
        "first_step_s": first_step,
        "first_step_sooner": fastest_compile / first_step["ours_plain"],
        "pct_of_ceiling": 100 * flops / (ms["ours_plain"] / 1000) / peak if peak else None,
        "ceiling": "bf16 matrix product of 1024 x 1024 measured in the same run" if ctx.device.type == "cpu" else "data sheet",
        "err": errors["ours"],
        # Held against the peer whose activations are bf16 like ours; autocast keeps the residual stream in fp32, at twice the memory.
        "peer_err": errors["pytorch_bf16_masters"],
        "peer_err_autocast": errors["pytorch_autocast"],
        "threads": torch.get_num_threads(),
        "clock": "process CPU time" if _counts_cpu(ctx) else "wall time",
        "rounds": rounds,
        "errors": errors,
        "loss_spread": spread,
        "kernels": {op: impl.name for op, impl in chosen.items()},
    }
    if profile:
        answer["profile"] = _profile(contestants["ours_plain"], WARM_UP + rounds)
    ours.close()
    with_deepspeed.close()
    return answer


def _counts_cpu(ctx: ParallelContext) -> bool:
    # With one thread, CPU time is what repeats on a machine with neighbours; with several it would add the threads up.
    return ctx.device.type == "cpu" and torch.get_num_threads() == 1


def _now(ctx: ParallelContext) -> float:
    if ctx.device.type == "cuda":
        torch.cuda.synchronize(ctx.device)
    return time.process_time() if _counts_cpu(ctx) else time.perf_counter()


def check_same_function(errors: dict[str, float], losses: dict[str, list[float]]) -> None:
    """Nobody wins by computing something else.

    Args:
        errors: of everybody's gradients of the first step.
        losses: of everybody's steps until now.

    Raises:
        RuntimeError: a gradient is further from float64 than bf16 explains, or the losses of the last step are further apart.
    """
    if wrong := {name: error for name, error in errors.items() if not error <= MAX_GRADIENT_ERROR}:
        raise RuntimeError(
            f"not the same function: gradients of the first step are {wrong} from float64, at most {MAX_GRADIENT_ERROR} is bf16"
        )
    last = {name: values[-1] for name, values in losses.items()}
    if not all(map(math.isfinite, last.values())) or max(last.values()) - min(last.values()) > MAX_LOSS_SPREAD:
        raise RuntimeError(f"not the same training: losses of one step differ by more than {MAX_LOSS_SPREAD}: {last}")


def _gradients_of_first_step(
    config: RunConfig, chosen: dict[str, Impl], rows: RandomRows, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Those of the peer's model in float64, and {"ours": our error against them}."""
    model = build_model(config, chosen)
    weights = model.initial_weights(config.seed)
    batch = to_device(rows.batch(range(ROWS)), device, document_mask=False, samples=range(ROWS))

    exact = PlainGPT(config.model, weights).double().to(device)
    F.cross_entropy(exact(batch.tokens).flatten(0, 1), batch.targets.flatten()).backward()  # type: ignore[no-untyped-call]
    truth = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}

    model.load_weights(weights)
    module = LossModule(model.to(device), chosen["cross_entropy"].fn)
    (module(batch) / batch.targets.numel()).backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return truth, {"ours": _distance(peer_tensors(ours, config.model.num_layers), truth)}


def _distance(gradients: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """||g - g64|| / ||g64|| over all parameters."""
    assert gradients.keys() == truth.keys()
    difference = sum(float((gradients[name].double() - truth[name]).square().sum()) for name in truth)
    return (difference / sum(float(g.square().sum()) for g in truth.values())) ** 0.5


def _profile(step: Callable[[int], float], n: int) -> list[dict[str, Any]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for i in range(3):
            step(n + i)
    events = profiler.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    top = sorted(events, key=lambda e: -e.self_cpu_time_total)[:12]
    return [{"op": e.key, "share": e.self_cpu_time_total / total, "calls_per_step": e.count / 3} for e in top]


def step_as_text(answer: dict[str, Any]) -> str:
    """The answer of ``race_step`` for a person."""
    lines = [
        f"one step of 6 x 384, batch {ROWS} x {LENGTH}, bf16, {answer['threads']} thread(s), {answer['clock']}, medians of {answer['rounds']}"
    ]
    rows = {"ours, plain engine": answer["ours_ms"], "ours, DeepSpeed ZeRO-1": answer["ours_deepspeed_zero1_ms"]}
    rows |= {TITLES[name]: ms for name, ms in answer["peers"].items()}
    best = answer["peers"][answer["best_peer"]]
    lines += [f"  {name:<30} {ms:9.1f} ms   {best / ms:5.2f} of the best autocast peer's speed" for name, ms in rows.items()]
    lines.append(
        f"  ours: {answer['ratio']:.2f} times the best with fp32 weights under autocast ({TITLES[answer['best_peer']]}), "
        f"{answer['ratio_bf16']:.2f} times the best with bf16 weights ({TITLES[answer['best_bf16_peer']]})"
    )
    first = answer["first_step_s"]
    lines.append(
        f"  first step: ours {first['ours_plain']:.2f} s, torch.compile {first['compile_autocast']:.1f} s (bf16 weights {first['compile_bf16_masters']:.1f} s): "
        f"ours is done {answer['first_step_sooner']:.0f} times sooner"
    )
    lines += [f"  {name} did not take part: {reason}" for name, reason in answer["absent"].items()]
    if answer["pct_of_ceiling"] is not None:
        lines.append(f"  {answer['pct_of_ceiling']:.0f} % of the ceiling ({answer['ceiling']})")
    lines.append(
        f"  error of all gradients of the first step against float64: ours {answer['err']:.2e}, "
        f"bf16 weights {answer['peer_err']:.2e}, autocast (fp32 residual stream) {answer['peer_err_autocast']:.2e}, "
        f"nobody over {max(answer['errors'].values()):.2e}; all losses of a step within {answer['loss_spread']:.1e}"
    )
    lines += [f"    {100 * p['share']:5.1f} %  {p['op']}  ({p['calls_per_step']:.0f} calls a step)" for p in answer.get("profile", [])]
    return "\n".join(lines)
