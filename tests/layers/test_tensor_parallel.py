"""Each tensor-parallel layer against the same layer whole: outputs and every gradient, with and without sequence parallelism.

B batch, T tokens, D model dim, N query heads, K key-value heads, H head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dist_llm.comm.build import build_context
from dist_llm.comm.context import Group, ParallelContext
from dist_llm.kernels.attention.sdpa import attention_sdpa
from dist_llm.kernels.rms_norm.reference import rms_norm_reference
from dist_llm.layers.attention import SelfAttention
from dist_llm.layers.embedding import Embedding, VocabParallelEmbedding
from dist_llm.layers.mlp import GeluMLP, SwigluMLP
from dist_llm.layers.norm import LayerNorm, RMSNorm
from dist_llm.layers.region import WHOLE, TensorRegion
from dist_llm.layers.rotary import rotary_table
from dist_llm.parallel.ranks import run_on_ranks
from dist_llm.planning.shards import tensor_slice
from dist_llm.topology.grid import RankGrid
from tests.models.models import make_config

WORLD = 4
B, T, D, H, N = 3, 8, 24, 6, 4
KV_HEADS = (4, 2, 1)
CONFIGS = {kv: make_config(num_kv_heads=kv, d_model=D, vocab_size=37, ffn_dim=20, bias=True, max_seq_len=T) for kv in KV_HEADS}
POSITIONS = torch.arange(T).expand(B, T)
DOC_IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]] * B, dtype=torch.int32)

# Sums of 24 or more products and of up to four ranks in another order: tens of roundings of 6e-8, relative to the largest element.
TOLERANCE = 2e-6


@dataclass(frozen=True)
class Case:
    """A layer, the logical name its parameters have in a model, and how it is called with what is in the residual stream."""

    prefix: str
    build: Callable[[TensorRegion], nn.Module]
    call: Callable[[nn.Module, torch.Tensor, TensorRegion], torch.Tensor]
    kv_heads: int = 4
    ids: bool = False


def attention(kv_heads: int, *, bias: bool, recompute: bool = False) -> Case:
    def build(region: TensorRegion) -> nn.Module:
        return SelfAttention(D, num_heads=N, num_kv_heads=kv_heads, head_dim=H, bias=bias, fn=attention_sdpa, region=region, recompute=recompute)  # fmt: skip

    def call(module: nn.Module, x: torch.Tensor, region: TensorRegion) -> torch.Tensor:
        del region
        return module(x, rotary=rotary_table(POSITIONS, H, 10_000.0), doc_ids=DOC_IDS)

    return Case("blocks.0.attention.", build, call, kv_heads=kv_heads)


def simple(prefix: str, build: Callable[[TensorRegion], nn.Module]) -> Case:
    return Case(prefix, build, lambda module, x, region: module(x))


CASES: dict[str, Case] = {
    **{
        f"attention, {kv} kv heads{', biases' if bias else ''}": attention(kv, bias=bias)
        for kv in KV_HEADS
        for bias in (False, True)
    },
    "attention, recomputed": attention(2, bias=True, recompute=True),
    "gelu": simple("blocks.0.mlp.", lambda region: GeluMLP(D, 20, bias=True, region=region)),
    "swiglu": simple("blocks.0.mlp.", lambda region: SwigluMLP(D, 20, bias=False, region=region)),
    "swiglu, biases": simple("blocks.0.mlp.", lambda region: SwigluMLP(D, 20, bias=True, region=region)),
    "rms norm": simple("final_norm.", lambda region: RMSNorm(D, eps=1e-5, fn=rms_norm_reference, region=region)),
    "layer norm": simple("final_norm.", lambda region: LayerNorm(D, eps=1e-5, bias=True, region=region)),
    "embedding": Case(
        "embedding.",
        lambda region: VocabParallelEmbedding(37, D, region=region),
        lambda module, x, region: module(x, torch.float32),
        ids=True,
    ),
    "positions": Case(
        "positions.",
        lambda region: Embedding(T, D, region=region),
        lambda module, x, region: module(region.own_tokens(POSITIONS, 1), torch.float32),
        ids=True,
    ),
}  # fmt: skip


def weights_of(name: str) -> dict[str, torch.Tensor]:
    """Whole weights by logical name, also of biases and gains."""
    module = CASES[name].build(WHOLE)
    generator = torch.Generator().manual_seed(7)
    return {CASES[name].prefix + n: 0.2 * torch.randn(p.shape, generator=generator) for n, p in module.named_parameters()}


def inputs_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters, (B, T, D) or ids (B, T), and the gradient of what leaves, (B, T, D): whole."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randint(0, 37, (B, T), generator=generator) if CASES[name].ids else torch.randn(B, T, D, generator=generator)
    return x, torch.randn(B, T, D, generator=generator)


def run_case(name: str, region: TensorRegion) -> dict[str, torch.Tensor]:
    """Output, gradient of the input, gradients of the parameters by logical name: this rank's."""
    case = CASES[name]
    module = case.build(region)
    with torch.no_grad():
        for n, p in module.named_parameters():
            whole = weights_of(name)[case.prefix + n]
            part = tensor_slice(case.prefix + n, CONFIGS[case.kv_heads], region.tp.size, region.tp.rank)
            p.copy_(whole if part is None else whole.narrow(part.dim, part.start, part.stop - part.start))
    x, dy = inputs_of(name)
    if not case.ids:
        # Every rank sees all ids, and its own stretch of the stream.
        x = region.own_tokens(x, 1).clone().requires_grad_()
    y = case.call(module, x, region)
    y.backward(region.own_tokens(dy, 1))
    answer = {"output": y.detach()} | {case.prefix + n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return answer if x.grad is None else {**answer, "input": x.grad}


def run_divided(ctx: ParallelContext) -> dict[str, dict[str, torch.Tensor]]:
    """Every case at tp 2 and 4, with and without sequence parallelism."""
    answers = {}
    for tp in (2, 4):
        for kv_heads in KV_HEADS:
            mine = build_context(RankGrid({"tp": tp, "dp": WORLD // tp}), ctx.world.rank, ctx.device, kv_heads=kv_heads)
            for sequence in (False, True):
                region = TensorRegion(tp=mine.tp, sequence=sequence, kv=mine.kv)
                for name, case in CASES.items():
                    if case.kv_heads == kv_heads:
                        answers[f"{name}/{tp}/{sequence}"] = run_case(name, region)
    return answers


@pytest.fixture(scope="module")
def divided() -> list[dict[str, dict[str, torch.Tensor]]]:
    return run_on_ranks(run_divided, dp=WORLD)


def error(ours: torch.Tensor, whole: torch.Tensor) -> float:
    assert ours.shape == whole.shape
    return float((ours.double() - whole.double()).abs().max() / whole.double().abs().max())


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient_are_those_of_the_whole_layer(
    divided: list[dict[str, dict[str, torch.Tensor]]], name: str, tp: int, sequence: bool
) -> None:
    case, whole = CASES[name], run_case(name, WHOLE)
    for world_rank, answers in enumerate(divided):
        rank, ours = world_rank % tp, answers[f"{name}/{tp}/{sequence}"]
        assert ours.keys() == whole.keys()
        for key, value in whole.items():
            if key in ("output", "input"):
                expected = value.chunk(tp, 1)[rank] if sequence else value
            else:
                part = tensor_slice(key, CONFIGS[case.kv_heads], tp, rank)
                expected = value if part is None else value.narrow(part.dim, part.start, part.stop - part.start)
            # A key bias moves all scores of a query alike where positions do not turn it: rotary positions do, so no gradient is zero.
            assert error(ours[key], expected) < TOLERANCE, (key, world_rank)


def test_ids_outside_the_vocabulary_part_of_a_rank_come_from_exactly_one_other(divided: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    # One summand is the row and the others are zero: no rounding at all.
    whole = run_case("embedding", WHOLE)["output"]
    for answers in divided:
        assert torch.equal(answers["embedding/4/False"]["output"], whole)


def test_tokens_that_the_ranks_do_not_divide_are_refused_with_both_numbers() -> None:
    region = TensorRegion(tp=Group(rank=1, size=4), sequence=True)
    with pytest.raises(ValueError, match=r"6 tokens must be divisible by tp \(4\)"):
        region.own_tokens(torch.zeros(2, 6), 1)
