"""Rules that need more than one key. All are looked at, and what breaks any of them is reported together.

A rule names the keys it reads, so that the others can still be checked when one key is already known to be bad. Its docstring is its
text in docs/config.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from dist_llm.config.problems import Problem
from dist_llm.config.schema import RunConfig

__all__ = ["RANK_KEYS", "RULES", "Rule", "broken_rules", "problems_for_ranks"]


@dataclass(frozen=True)
class Rule:
    """``broken_by`` answers with a sentence that follows the first of ``keys``, or ``None``."""

    keys: tuple[str, ...]
    broken_by: Callable[[RunConfig], str | None]


def _heads_divide_width(config: RunConfig) -> str | None:
    """`model.d_model` is divisible by `model.num_heads`, unless `model.head_dim` is given."""
    m = config.model
    if m.head_dim is not None or m.d_model % m.num_heads == 0:
        return None
    return f"{m.d_model} must be divisible by model.num_heads ({m.num_heads}); change one of them, or give model.head_dim"


def _kv_heads_divide_heads(config: RunConfig) -> str | None:
    """`model.num_heads` is divisible by `model.num_kv_heads`."""
    m = config.model
    if m.num_heads % m.kv_heads == 0:
        return None
    return f"{m.kv_heads} must divide model.num_heads ({m.num_heads}): every key and value head serves equally many query heads"


def _rotary_needs_even_heads(config: RunConfig) -> str | None:
    """With `model.position: rotary`, the size of a head (`model.head_dim`, or `model.d_model / model.num_heads`) is even."""
    m = config.model
    if m.position != "rotary" or m.head_size % 2 == 0 or _heads_divide_width(config):
        return None
    source = "model.head_dim" if m.head_dim is not None else f"model.d_model ({m.d_model}) / model.num_heads ({m.num_heads})"
    return f"rotary turns pairs of numbers, so the size of a head must be even, not {m.head_size} = {source}; change it, or use learned"


def _base_head_needs_base_width(config: RunConfig) -> str | None:
    """`model.mup_base_head_dim` is given only with `model.mup_base_width`."""
    m = config.model
    if m.mup_base_head_dim is None or m.mup_base_width is not None:
        return None
    return f"{m.mup_base_head_dim} has no meaning without muP; give model.mup_base_width as well, or leave it out"


def _row_fits_model(config: RunConfig) -> str | None:
    """`data.seq_len` is at most `model.max_seq_len`."""
    if config.data.seq_len <= config.model.max_seq_len:
        return None
    return (
        f"{config.data.seq_len} must be at most model.max_seq_len ({config.model.max_seq_len}); shorten the rows or raise model.max_seq_len"
    )


def _batch_is_whole(config: RunConfig) -> str | None:
    """`train.batch_size` is divisible by `train.micro_batch_size` times the data-parallel ranks."""
    return _batch_divides(config, config.parallel.dp or 1, "parallel.dp")


def _tp_divides_model(config: RunConfig) -> str | None:
    """`parallel.tp` divides `model.num_heads` and `model.ffn_dim`, and divides `model.num_kv_heads` or is a multiple of it."""
    m, tp = config.model, config.parallel.tp
    if m.num_heads % tp != 0:
        return f"{tp} must divide model.num_heads ({m.num_heads}): each rank computes whole heads; {_divisors(m.num_heads)} would"
    if m.kv_heads % tp != 0 and tp % m.kv_heads != 0:
        fits = [n for n in range(1, m.num_heads + 1) if m.num_heads % n == 0 and (m.kv_heads % n == 0 or n % m.kv_heads == 0)]
        return f"{tp} must divide model.num_kv_heads ({m.kv_heads}), or be a multiple of it (then heads are copied); {_listed(fits)} would"
    if m.ffn_size % tp != 0:
        return f"{tp} must divide the MLP's inner width ({m.ffn_size}); {_divisors(m.ffn_size)} would"
    if (tp - 1) * -(-m.vocab_size // tp) >= m.vocab_size:
        return f"{tp} ranks cannot share a vocabulary of {m.vocab_size}: the last would hold none of it; use fewer"
    return None


def _sequence_parallel_divides(config: RunConfig) -> str | None:
    """With `parallel.sequence_parallel`, `parallel.tp` is at least 2 and divides the tokens of a row that a rank holds."""
    p, seq_len = config.parallel, config.data.seq_len
    if not p.sequence_parallel:
        return None
    if p.tp == 1:
        return "true needs parallel.tp of at least 2: it divides the tokens over the tensor-parallel ranks"
    if seq_len % (p.cp * p.tp) != 0:
        held = f" / parallel.cp ({p.cp})" if p.cp > 1 else ""
        return f"needs data.seq_len ({seq_len}){held} divisible by parallel.tp ({p.tp})"
    return None


def _cp_divides_row(config: RunConfig) -> str | None:
    """`parallel.cp` divides the row: `data.seq_len` by 2 cp for a ring (each rank holds an early and a late part), by cp for all_to_all, where it divides the heads of a rank too."""
    p, m, seq_len = config.parallel, config.model, config.data.seq_len
    if p.cp == 1:
        return None
    if p.cp_kind == "ring":
        if seq_len % (2 * p.cp) != 0:
            return f"{p.cp} ranks in a ring need data.seq_len ({seq_len}) divisible by {2 * p.cp}: each holds an early and a late part of a row"
        return None
    if seq_len % p.cp != 0:
        return f"{p.cp} must divide data.seq_len ({seq_len})"
    heads = m.num_heads // p.tp
    if heads % p.cp != 0:
        return (
            f"{p.cp} ranks cannot exchange the {heads} heads of a tensor-parallel rank (model.num_heads {m.num_heads} / parallel.tp {p.tp}); "
            "use parallel.cp_kind ring, or fewer ranks"
        )
    return None


def _ring_has_no_window(config: RunConfig) -> str | None:
    """`model.window` is not divided by a ring: with `parallel.cp` above 1, `parallel.cp_kind` is all_to_all."""
    p, window = config.parallel, config.model.window
    if window is None or p.cp == 1 or p.cp_kind != "ring":
        return None
    return f"{window} cannot be had with parallel.cp ({p.cp}) in a ring, which passes on whole keys; use parallel.cp_kind all_to_all"


def _alternating_needs_window(config: RunConfig) -> str | None:
    """`model.window_layers: alternate` is given only with `model.window`."""
    if config.model.window_layers == "all" or config.model.window is not None:
        return None
    return "alternate has no meaning without a window; give model.window as well, or leave it out"


def _stages_have_layers(config: RunConfig) -> str | None:
    """Every pipeline stage has a layer: `parallel.pp` times `parallel.chunks` is at most `model.num_layers`."""
    p, layers = config.parallel, config.model.num_layers
    if p.pp * p.chunks <= layers:
        return None
    chunks = f" x parallel.chunks ({p.chunks})" if p.chunks > 1 else ""
    return f"{p.pp}{chunks} stages need as many layers, and model.num_layers is {layers}; use fewer stages"


def _chunks_fit_alone(config: RunConfig) -> str | None:
    """`parallel.chunks` is more than 1 only with `parallel.schedule: interleaved`."""
    p = config.parallel
    if p.schedule == "interleaved" or p.chunks == 1:
        return None
    return f"{p.chunks} has a meaning only with parallel.schedule interleaved; use it, or leave parallel.chunks out"


def _interleaved_needs_stages(config: RunConfig) -> str | None:
    """`parallel.schedule: interleaved` has at least 2 pipeline ranks and 2 chunks on each."""
    p = config.parallel
    if p.schedule != "interleaved" or (p.pp > 1 and p.chunks > 1):
        return None
    return f"interleaved needs parallel.pp ({p.pp}) and parallel.chunks ({p.chunks}) of at least 2; raise them, or use 1f1b"


def _zero_fits_pipeline(config: RunConfig) -> str | None:
    """With `parallel.pp` of 2 or more, `parallel.zero` is 0 or 1."""
    p = config.parallel
    if p.pp == 1 or p.zero < 2:
        return None
    reason = (
        "would reduce gradients after every micro-batch of the pipeline instead of once a step"
        if p.zero == 2
        else "would gather the parameters of a stage anew for every micro-batch, in an order that changes with the schedule"
    )
    return f"{p.zero} {reason}; with parallel.pp {p.pp} use parallel.zero 1, or zero {p.zero} without a pipeline (parallel.tp and parallel.cp go with it)"


def _offload_fits_zero(config: RunConfig) -> str | None:
    """Offload needs ZeRO: the optimiser's stage 1 or more, the parameters' stage 3. nvme is refused: see docs/parallelism.md."""
    p = config.parallel
    if p.offload_parameters != "none" and p.zero < 3:
        return f"{p.zero} keeps parameters whole on each rank; parallel.offload_parameters {p.offload_parameters} needs parallel.zero 3"
    if p.offload_optimizer != "none" and p.zero < 1:
        return f"{p.zero} divides no optimiser state; parallel.offload_optimizer {p.offload_optimizer} needs parallel.zero 1 or more"
    return None


def _nvme_is_refused(config: RunConfig) -> str | None:
    """Nothing is offloaded to `nvme`."""
    p = config.parallel
    if p.offload_optimizer != "nvme" and p.offload_parameters != "nvme":
        return None
    key = "parallel.offload_optimizer" if p.offload_optimizer == "nvme" else "parallel.offload_parameters"
    return (
        f"{key} nvme needs DeepSpeed's async_io operator, which is compiled against libaio (libaio-dev) at first use, and keeps state in "
        f"swap files that checkpoints cannot be read from or written to yet; use {key} cpu, or more ranks"
    )


def _recompute_layers_fit(config: RunConfig) -> str | None:
    """`parallel.recompute_layers` is given only with `parallel.recompute`."""
    p = config.parallel
    if p.recompute_layers is None or p.recompute != "none":
        return None
    return f"{p.recompute_layers} has no meaning with parallel.recompute none; use selective or full, or leave it out"


def _divisors(number: int) -> str:
    return _listed([n for n in range(1, number + 1) if number % n == 0])


def _listed(numbers: list[int]) -> str:
    shown = [str(n) for n in numbers[:8]] + (["..."] if len(numbers) > 8 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _warmup_fits(config: RunConfig) -> str | None:
    """`optim.warmup_steps` is at most `train.steps`."""
    if config.optim.warmup_steps <= config.train.steps:
        return None
    return f"{config.optim.warmup_steps} must be at most train.steps ({config.train.steps}); shorten the warm-up or train longer"


def _decay_fits(config: RunConfig) -> str | None:
    """With `optim.schedule: wsd`, `optim.warmup_steps` and `optim.decay_steps` together are at most `train.steps`."""
    o, steps = config.optim, config.train.steps
    # The default is that of optim/schedule.py: without it a long warm-up would end in a jump.
    decay = o.decay_steps if o.decay_steps is not None else max(1, steps // 5)
    if o.schedule != "wsd" or o.warmup_steps > steps or o.warmup_steps + decay <= steps:
        return None
    default = " (the default, a fifth of the run)" if o.decay_steps is None else ""
    return f"{decay}{default} and optim.warmup_steps ({o.warmup_steps}) together must be at most train.steps ({steps}); shorten one of them or train longer"


def _decay_needs_wsd(config: RunConfig) -> str | None:
    """`optim.decay_steps` is given only with `optim.schedule: wsd`."""
    o = config.optim
    if o.decay_steps is None or o.schedule == "wsd":
        return None
    return f"{o.decay_steps} has no meaning with optim.schedule {o.schedule}; use optim.schedule wsd, or leave optim.decay_steps out"


def _plain_has_no_zero(config: RunConfig) -> str | None:
    """`parallel.zero` 2 and 3 need DeepSpeed, so they are refused with `train.engine: plain`; 0 and 1 change nothing on its single rank."""
    if config.train.engine != "plain" or config.parallel.zero < 2:
        return None
    return f"{config.parallel.zero} cannot be had with train.engine plain, which divides nothing; use train.engine deepspeed, or leave parallel.zero out"


def _plain_is_one_rank(config: RunConfig) -> str | None:
    """`train.engine: plain` runs on one rank."""
    p = config.parallel
    ranks = (p.dp or 1) * p.tp * p.cp * p.pp
    if config.train.engine != "plain" or ranks == 1:
        return None
    return f"plain runs on one rank, and parallel asks for {ranks} (dp x tp x cp x pp); use train.engine deepspeed or auto"


RULES = (
    Rule(("model.d_model", "model.num_heads", "model.head_dim"), _heads_divide_width),
    Rule(("model.num_kv_heads", "model.num_heads"), _kv_heads_divide_heads),
    Rule(("model.position", "model.head_dim", "model.d_model", "model.num_heads"), _rotary_needs_even_heads),
    Rule(("model.mup_base_head_dim", "model.mup_base_width"), _base_head_needs_base_width),
    Rule(("data.seq_len", "model.max_seq_len"), _row_fits_model),
    Rule(("train.batch_size", "train.micro_batch_size", "parallel.dp"), _batch_is_whole),
    Rule(("optim.warmup_steps", "train.steps"), _warmup_fits),
    Rule(("optim.decay_steps", "optim.warmup_steps", "train.steps", "optim.schedule"), _decay_fits),
    Rule(("optim.decay_steps", "optim.schedule"), _decay_needs_wsd),
    Rule(("parallel.zero", "train.engine"), _plain_has_no_zero),
    Rule(("train.engine", "parallel.dp", "parallel.tp", "parallel.cp", "parallel.pp"), _plain_is_one_rank),
    Rule(("parallel.tp", "model.num_heads", "model.num_kv_heads", "model.ffn_dim", "model.vocab_size", "model.d_model"), _tp_divides_model),
    Rule(("parallel.sequence_parallel", "parallel.tp", "parallel.cp", "data.seq_len"), _sequence_parallel_divides),
    Rule(("parallel.cp", "parallel.cp_kind", "parallel.tp", "data.seq_len", "model.num_heads"), _cp_divides_row),
    Rule(("model.window", "parallel.cp", "parallel.cp_kind"), _ring_has_no_window),
    Rule(("model.window_layers", "model.window"), _alternating_needs_window),
    Rule(("parallel.pp", "parallel.chunks", "model.num_layers"), _stages_have_layers),
    Rule(("parallel.chunks", "parallel.schedule"), _chunks_fit_alone),
    Rule(("parallel.schedule", "parallel.pp", "parallel.chunks"), _interleaved_needs_stages),
    Rule(("parallel.zero", "parallel.pp"), _zero_fits_pipeline),
    Rule(("parallel.zero", "parallel.offload_optimizer", "parallel.offload_parameters"), _offload_fits_zero),
    Rule(("parallel.offload_optimizer", "parallel.offload_parameters"), _nvme_is_refused),
    Rule(("parallel.recompute_layers", "parallel.recompute"), _recompute_layers_fit),
)


def broken_rules(config: RunConfig, bad: Collection[str] = ()) -> list[tuple[Rule, str]]:
    """The rules that ``config`` breaks, each with its sentence; rules that read a key in ``bad`` are left out."""
    broken = []
    for rule in RULES:
        if not any(key in bad for key in rule.keys) and (message := rule.broken_by(config)):
            broken.append((rule, message))
    return broken


# What problems_for_ranks reads.
RANK_KEYS = ("parallel.dp", "parallel.tp", "parallel.cp", "parallel.pp", "train.engine", "train.batch_size", "train.micro_batch_size")


def problems_for_ranks(config: RunConfig, world_size: int) -> list[Problem]:
    """What makes ``config`` unfit for ``world_size`` ranks; empty when it fits.

    Kept apart from the rules because the number of ranks belongs to the launch, not to the config. The problems name no file.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, not {world_size}")
    problems = []
    p = config.parallel
    model = p.tp * p.cp * p.pp
    if world_size % model != 0:
        factors = " x ".join(f"{axis} {size}" for axis, size in (("tp", p.tp), ("cp", p.cp), ("pp", p.pp)) if size > 1)
        message = f"one copy of the model takes {factors} = {model} ranks, and {world_size} were started; start a multiple of {model}"
        axis = next(axis for axis in ("tp", "cp", "pp") if getattr(p, axis) > 1)
        return [Problem("", None, f"parallel.{axis}", message)]
    dp = world_size // model
    if p.dp is not None and p.dp != dp:
        started = f"the number of ranks started ({world_size})" + (f" / {model} of one model copy = {dp}" if model > 1 else "")
        message = f"{p.dp} must equal {started}; start {p.dp * model}, or leave parallel.dp out to use all"
        problems.append(Problem("", None, "parallel.dp", message))
    if config.train.engine == "plain" and world_size > 1:
        message = f"plain runs on one rank, and {world_size} were started; use train.engine deepspeed or auto, or start one"
        problems.append(Problem("", None, "train.engine", message))
    if indivisible := _batch_divides(config, dp, "ranks" if model == 1 else "data-parallel ranks"):
        problems.append(Problem("", None, "train.batch_size", indivisible))
    elif p.schedule == "interleaved" and (micros := config.train.batch_size // (config.train.micro_batch_size * dp)) % p.pp != 0:
        message = f"interleaved needs a multiple of parallel.pp ({p.pp}) micro-batches, and a step has {micros}; change train.batch_size, or use 1f1b"
        problems.append(Problem("", None, "parallel.schedule", message))
    return problems


def _batch_divides(config: RunConfig, ranks: int, name: str) -> str | None:
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    portion = micro * ranks
    if batch % portion == 0:
        return None
    divisor = f"train.micro_batch_size ({micro})" + (f" times {name} ({ranks}) = {portion}" if ranks > 1 else "")
    below, above = batch // portion * portion, (batch // portion + 1) * portion
    fits = f"{below} or {above}" if below else str(above)
    return f"{batch} must be divisible by {divisor}; {fits} would be"
