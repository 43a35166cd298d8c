"""Which model, how many tokens, which batch: from a number of FLOPs, by a scaling law over a ladder of shapes that train well.

The law is that of Hoffmann et al. (arXiv:2203.15556) as Besiroglu et al. (arXiv:2404.10102) refitted it. What is not known is said
with it: what other published fits advise, and how far one may go from the best size for a hundredth of a nat. A mixture of experts
enters the law as the dense model of the same loss (Clark et al., arXiv:2202.01169).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_llm.planning.count_shapes import ShapeCount, shape_params
from dist_llm.planning.experts import ROUTING_LAWS
from dist_llm.planning.laws import APPROACH_1, HOFFMANN, REPLICATION, ChinchillaLaw, Optimum
from dist_llm.planning.shapes import ModelShape
from dist_llm.utils.errors import ConfigError

__all__ = ["LAWS", "Advice", "advise", "batch_rows", "learning_rate", "model_ladder", "worth", "worth_params"]

LAWS = {"replication": REPLICATION, "hoffmann": HOFFMANN}
_TOLERATED = 0.01  # nats

# (step, up to): widths of the ladder. Heads are 32 wide below 512, 64 below 1024 and 128 from there on, and even in number, so that tensor
# parallelism finds divisors; wide models get rounder widths.
_WIDTHS = ((64, 512), (128, 1024), (256, 2048), (512, 4096), (1024, 16384), (2048, 32768), (4096, 65536))


@dataclass(frozen=True)
class Advice:
    """A model of the ladder for a number of FLOPs, and how sure that is.

    best: what the law advises without a ladder (of a dense model). tokens: 6 N D = flops for the model's active parameters.
    loss: by the law, in nats per token of the law's own text. published: sizes that the published fits advise, smallest and
    largest. tolerated: sizes that the law puts within 0.01 nat of its optimum at these FLOPs.
    """

    flops: float
    model: ModelShape
    count: ShapeCount
    tokens: float
    loss: float
    best: Optimum
    published: tuple[float, float]
    tolerated: tuple[float, float]


def model_ladder(vocab_size: int, seq_len: int, *, experts: int = 0, active: int = 0) -> list[ModelShape]:
    """LLaMA-like shapes from about a million to about four trillion parameters, smallest first; with experts in every layer if asked."""
    shapes = []
    width = 64
    for step, until in _WIDTHS:
        while width < until:
            shapes += [_shape(width, layers, vocab_size, seq_len, experts, active) for layers in _depths(width)]
            width += step
    return sorted(shapes, key=lambda shape: shape_params(shape).active)


def _depths(width: int) -> list[int]:
    # A layer for 64 of width up to 1024, then one for 170: between LLaMA's family (4096 x 32, 8192 x 80) and Chinchilla's (512 x 8, 4096 x 40).
    # Multiples of 4 and 8, which pipelines can share.
    usual = width / 64 if width <= 1024 else min(128.0, 16 + (width - 1024) / 170)
    grain = 8 if usual >= 24 else 4 if usual >= 8 else 2
    middle = max(4, round(usual / grain) * grain)
    return [middle, middle + grain] if width < 4096 else [middle - grain, middle, middle + grain]


def _shape(width: int, layers: int, vocab_size: int, seq_len: int, experts: int, active: int) -> ModelShape:
    head = 128 if width >= 1024 else 64 if width >= 512 else 32
    heads = width // head
    grain = 256 if width >= 1024 else 64
    return ModelShape(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=8
        if width >= 4096 and heads % 8 == 0
        else heads,  # grouped queries where keys would fill the memory, as in LLaMA 2 70B
        head_dim=head,
        ffn_dim=-(-8 * width // (3 * grain)) * grain,
        gated=True,
        vocab_size=vocab_size,
        seq_len=seq_len,
        tied=width < 1024,  # a small model would spend most of its parameters on two tables
        num_experts=experts,
        experts_per_token=active,
    )


def worth_params(model: ModelShape, count: ShapeCount) -> float:
    """Parameters of the dense model that the law counts for ``model``.

    E experts of which k are met are taken as E/k experts of which one is (Clark's S-BASE fit has one); above a trillion parameters
    experts add nothing by that fit.
    """
    if not model.num_experts:
        return float(count.total)
    expansion = max(1, round(model.num_experts / model.experts_per_token))
    return max(float(count.active), ROUTING_LAWS["s-base"].effective_params(float(count.active), expansion))


def worth(model: ModelShape, count: ShapeCount, tokens: float, law: ChinchillaLaw) -> float:
    """Loss that ``law`` gives ``model`` after ``tokens`` tokens, nats per token."""
    return law.loss(worth_params(model, count), tokens)


def advise(flops: float, ladder: list[ModelShape], law: ChinchillaLaw = REPLICATION, *, is_cut: bool = False) -> Advice:
    """The shape of ``ladder`` with the lowest loss for ``flops`` training FLOPs, 6 a parameter and token.

    is_cut: the ladder ends where models no longer fit, and its largest one may be trained for longer than is best.

    Raises:
        ConfigError: too few FLOPs for any model of the ladder, or too many.
    """
    counts = [shape_params(shape) for shape in ladder]
    losses = [worth(shape, count, flops / (6 * count.active), law) for shape, count in zip(ladder, counts, strict=True)]
    at = min(range(len(ladder)), key=losses.__getitem__)
    model, count = ladder[at], counts[at]
    tokens = flops / (6 * count.active)
    if tokens < count.active or (at == len(ladder) - 1 and not is_cut):
        side = "less than the smallest" if tokens < count.active else "more than the largest"
        raise ConfigError(
            f"{flops:.2g} FLOPs are {side} model of the ladder asks for ({count.total:.3g} parameters); say the model: --model CONFIG or --params N"
        )
    best = law.optimal(flops)
    sizes = [fit.optimal(flops).params for fit in (HOFFMANN, REPLICATION)] + [APPROACH_1.params(flops)]
    return Advice(
        flops=flops,
        model=model,
        count=count,
        tokens=tokens,
        loss=losses[at],
        best=best,
        published=(min(sizes), max(sizes)),
        tolerated=_tolerated(law, best),
    )


def _tolerated(law: ChinchillaLaw, best: Optimum) -> tuple[float, float]:
    # The loss along 6 N D = C rises on both sides of the optimum: bisection on each for where it has risen by the tolerance.
    work = best.flops / 6

    def edge(direction: float) -> float:
        near, far = math.log(best.params), math.log(best.params) + direction * math.log(1e4)
        for _ in range(50):
            middle = (near + far) / 2
            within = law.loss(math.exp(middle), work / math.exp(middle)) <= best.loss + _TOLERATED
            near, far = (middle, far) if within else (near, middle)
        return math.exp(near)

    return edge(-1.0), edge(1.0)


def batch_rows(flops: float, seq_len: int, gpus: int) -> int:
    """Rows of a step that divide over ``gpus`` devices, near the batch that lost least in DeepSeek's runs: 0.292 C^0.3271 tokens.

    Bi et al. (arXiv:2401.02954, equation 1) fit it to runs of up to 2e19 FLOPs. The rows are gpus times a power of two, so that data
    parallelism and micro-batches find divisors.
    """
    wanted = 0.2920 * flops**0.3271 / seq_len
    rows = gpus
    while rows > wanted * math.sqrt(2) and rows % 2 == 0:
        rows //= 2
    while rows * math.sqrt(2) < wanted:
        rows *= 2
    return rows


def learning_rate(flops: float) -> float:
    """Peak rate that lost least in DeepSeek's runs: 0.3118 C^-0.125 (arXiv:2401.02954, equation 1), two digits of it."""
    return float(f"{0.3118 * flops**-0.1250:.1e}")
