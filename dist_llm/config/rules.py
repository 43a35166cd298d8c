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
    dp = config.parallel.dp
    if config.train.engine != "plain" or dp is None or dp == 1:
        return None
    return f"{dp} ranks cannot be had with train.engine plain, which runs on one; use train.engine deepspeed or auto"


RULES = (
    Rule(("model.d_model", "model.num_heads", "model.head_dim"), _heads_divide_width),
    Rule(("model.num_kv_heads", "model.num_heads"), _kv_heads_divide_heads),
    Rule(("model.position", "model.head_dim", "model.d_model", "model.num_heads"), _rotary_needs_even_heads),
    Rule(("data.seq_len", "model.max_seq_len"), _row_fits_model),
    Rule(("train.batch_size", "train.micro_batch_size", "parallel.dp"), _batch_is_whole),
    Rule(("optim.warmup_steps", "train.steps"), _warmup_fits),
    Rule(("optim.decay_steps", "optim.warmup_steps", "train.steps", "optim.schedule"), _decay_fits),
    Rule(("optim.decay_steps", "optim.schedule"), _decay_needs_wsd),
    Rule(("parallel.zero", "train.engine"), _plain_has_no_zero),
    Rule(("parallel.dp", "train.engine"), _plain_is_one_rank),
)


def broken_rules(config: RunConfig, bad: Collection[str] = ()) -> list[tuple[Rule, str]]:
    """The rules that ``config`` breaks, each with its sentence; rules that read a key in ``bad`` are left out."""
    broken = []
    for rule in RULES:
        if not any(key in bad for key in rule.keys) and (message := rule.broken_by(config)):
            broken.append((rule, message))
    return broken


# What problems_for_ranks reads.
RANK_KEYS = ("parallel.dp", "train.engine", "train.batch_size", "train.micro_batch_size")


def problems_for_ranks(config: RunConfig, world_size: int) -> list[Problem]:
    """What makes ``config`` unfit for ``world_size`` ranks; empty when it fits.

    Kept apart from the rules because the number of ranks belongs to the launch, not to the config. The problems name no file.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, not {world_size}")
    problems = []
    dp = config.parallel.dp
    if dp is not None and dp != world_size:
        message = f"{dp} must equal the number of ranks started ({world_size}); start {dp}, or leave parallel.dp out to use all"
        problems.append(Problem("", None, "parallel.dp", message))
    if config.train.engine == "plain" and world_size > 1:
        message = f"plain runs on one rank, and {world_size} were started; use train.engine deepspeed or auto, or start one"
        problems.append(Problem("", None, "train.engine", message))
    if indivisible := _batch_divides(config, world_size, "ranks"):
        problems.append(Problem("", None, "train.batch_size", indivisible))
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
