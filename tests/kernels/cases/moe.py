"""Mixture of experts: the choice of experts, rows sorted and brought back, and the experts' MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dist_llm.kernels.moe import MLP_IMPLS, PERMUTE_IMPLS, ROUTE_IMPLS, UNPERMUTE_IMPLS
from dist_llm.kernels.moe.reference import moe_permute_reference
from tests.kernels.case import Case, Sample

# Tokens, experts, top_k, and what differs from the defaults; "bias": True stands for some bias.
ROUTE_SIZES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "odd": (37, 13, 3, {}),
    "one token": (1, 8, 2, {}),
    "one expert": (5, 1, 1, {}),
    "no token": (0, 4, 2, {}),
    "top 1": (9, 17, 1, {}),
    "all experts": (6, 20, 20, {}),
    "probabilities as weights": (11, 10, 2, {"normalize": False, "scale": 1.5}),
    "sigmoid": (11, 19, 4, {"scores": "sigmoid"}),
    "sigmoid top 1, not normalized": (8, 6, 1, {"scores": "sigmoid", "normalize": False, "scale": 0.5}),
    "softmax with bias": (13, 12, 3, {"bias": True}),
    "groups": (10, 24, 3, {"groups": 6, "groups_kept": 2}),
    "groups of one": (7, 12, 5, {"groups": 12, "groups_kept": 6}),
    "as DeepSeek-V3": (9, 256, 8, {"scores": "sigmoid", "bias": True, "groups": 8, "groups_kept": 4, "scale": 2.5}),
    "several parts": (1100, 8, 2, {}),
}
ROUTE_GPU_SIZES = {"tokens of a model": (20000, 256, 8, {"scores": "sigmoid", "bias": True, "groups": 8, "groups_kept": 4, "scale": 2.5})}


def separated(num_tokens: int, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """Logits no two of which are equal in a token, also in bf16: a choice that hangs on the last digit would not be comparable."""
    order = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)
    return (order - num_experts // 2) * min(0.25, 24 / num_experts)


def make_route(size: tuple[int, int, int, dict[str, Any]], dtype: torch.dtype) -> Sample:
    num_tokens, num_experts, top_k, options = size
    generator = torch.Generator().manual_seed(7)
    logits = separated(num_tokens, num_experts, generator).to(dtype)
    kwargs = dict(options)
    if kwargs.pop("bias", False):
        kwargs["bias"] = 0.2 * torch.randn(num_experts, generator=generator)
    # A gradient is a difference; arriving ones are at most 3.
    scales = {4: 6 * (1 + kwargs.get("scale", 1.0))}
    return Sample((logits, top_k), kwargs=kwargs, wanted=(0,), scales=scales)


def route_checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    ops = torch.ops.dist_llm
    logits = make_route((3, 6, 2, {}), dtype).args[0]
    checks: list[tuple[Any, tuple[Any, ...]]] = []
    for sigmoid, bias in ((False, None), (True, torch.randn(6))):
        weights, experts, probabilities, _ = ops.moe_route(logits, bias, 2, sigmoid, 2, 1, True, 1.5)
        checks.append((ops.moe_route, (logits.clone().requires_grad_(), bias, 2, sigmoid, 2, 1, True, 1.5)))
        saved = (weights, experts, probabilities, sigmoid, True, 1.5, dtype)
        checks.append((ops.moe_route_backward, (torch.randn_like(weights), torch.randn_like(probabilities), *saved)))
        checks.append((ops.moe_route_backward, (torch.randn_like(weights), None, *saved)))
    return checks


class Routed(NamedTuple):
    """Tokens, width, choices of a token, experts, and which of them are chosen."""

    tokens: int
    width: int
    top_k: int
    experts: int
    which: str = "any"

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """(tokens, top_k) int32."""
        experts = torch.rand(self.tokens, max(self.experts, self.top_k), generator=generator).argsort(-1)[:, : self.top_k]
        if self.which == "one":
            experts = torch.full_like(experts, self.experts - 1)
        elif self.which == "few":
            experts = experts // 4 * 4
        elif self.which == "dropped":
            experts = experts.masked_fill(torch.rand(experts.shape, generator=generator) < 0.4, -1)
        elif self.which == "none":
            experts = torch.full_like(experts, -1)
        return experts.to(torch.int32)


PERMUTE_SIZES = {
    "odd": Routed(37, 123, 3, 7),
    "one token": Routed(1, 64, 2, 8),
    "one expert": Routed(6, 40, 1, 1),
    "no token": Routed(0, 16, 2, 4),
    "all experts": Routed(5, 33, 6, 6),
    "width 1": Routed(9, 1, 2, 5),
    "to one expert": Routed(70, 24, 1, 4, "one"),
    "empty experts": Routed(29, 17, 2, 40, "few"),
    "dropped": Routed(50, 96, 2, 9, "dropped"),
    "all dropped": Routed(4, 8, 2, 3, "none"),
    "several parts": Routed(1500, 32, 2, 16),
    "many experts": Routed(40, 136, 4, 300),
    "blocks of 1024 threads": Routed(2, 8192, 2, 3),
}
PERMUTE_GPU_SIZES = {
    "tokens of a model": Routed(20000, 2048, 8, 256),
    "more parts than are kept apart": Routed(300000, 8, 4, 64, "dropped"),
}


def make_permute(size: Routed, dtype: torch.dtype) -> Sample:
    generator = torch.Generator().manual_seed(11)
    experts = size.draw(generator)
    x = torch.randn(size.tokens, size.width, generator=generator).to(dtype)
    # The gradients of a token's slots can cancel.
    return Sample((x, experts, size.experts), wanted=(0,), scales={4: 3.0 * size.top_k})


def make_unpermute(size: Routed, dtype: torch.dtype) -> Sample:
    generator = torch.Generator().manual_seed(13)
    source = moe_permute_reference(torch.zeros(size.tokens, 1), size.draw(generator), size.experts)[1]
    rows = torch.randn(size.tokens * size.top_k, size.width, generator=generator).to(dtype)
    weights = torch.rand(size.tokens, size.top_k, generator=generator)
    scales = {}
    if rows.numel() > 0:
        largest_dot = float(3 * rows.double().abs().sum(-1).max())
        scales = {0: float(size.top_k * rows.abs().max()), 2: largest_dot}
    return Sample((rows, source, weights), kwargs={"top_k": size.top_k}, wanted=(0, 2), scales=scales)


def make_unpermute_unweighted(size: Routed, dtype: torch.dtype) -> Sample:
    sample = make_unpermute(size, dtype)
    scales = {0: sample.scales[0]} if 0 in sample.scales else {}
    return Sample((*sample.args[:2], None), kwargs=sample.kwargs, wanted=(0,), scales=scales)


def permute_checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    x, experts, num_experts = make_permute(Routed(5, 6, 2, 3, "dropped"), dtype).args
    return [(torch.ops.dist_llm.moe_permute, (x.requires_grad_(), experts, num_experts))]


def unpermute_checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    rows, source, weights = make_unpermute(Routed(5, 6, 2, 3, "dropped"), dtype).args
    dout = torch.randn(5, 6).to(dtype)
    ops = torch.ops.dist_llm
    leaves = (rows.clone().requires_grad_(), source, weights.clone().requires_grad_())
    return [(ops.moe_unpermute, (*leaves, 2)), (ops.moe_unpermute_backward, (dout, rows, source, weights, 2))]


def unpermute_unweighted_checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    rows, source, _ = make_unpermute(Routed(5, 6, 2, 3, "dropped"), dtype).args
    ops = torch.ops.dist_llm
    return [
        (ops.moe_unpermute, (rows.clone().requires_grad_(), source, None, 2)),
        (ops.moe_unpermute_backward, (torch.randn(5, 6).to(dtype), None, source, None, 2)),
        (ops.moe_zero_rest_, (rows, torch.tensor([1, 0, 3], dtype=torch.int32))),
    ]


class Ragged(NamedTuple):
    """Rows of each expert, rows of none, H and F, and whether there is a gate."""

    counts: tuple[int, ...]
    rest: int
    width: int
    inner: int
    gated: bool = True


MLP_SIZES = {
    "odd": Ragged((5, 0, 12, 1), 0, 33, 21),
    "gelu": Ragged((7, 2, 0, 9), 0, 24, 40, gated=False),
    "one expert": Ragged((11,), 0, 16, 8),
    "all rows to the last": Ragged((0, 0, 19), 0, 40, 17),
    "rows of no expert": Ragged((3, 4), 5, 32, 16),
    "rows of no expert, gelu": Ragged((0, 6), 3, 20, 10, gated=False),
    "no row": Ragged((0, 0), 0, 16, 16),
    "only rows of no expert": Ragged((0, 0, 0), 4, 16, 24),
    "one row": Ragged((0, 1, 0), 0, 64, 32),
}
MLP_GPU_SIZES = {"experts of a model": Ragged((700, 0, 1300, 48), 100, 1024, 512)}


def make_mlp(size: Ragged, dtype: torch.dtype) -> Sample:
    generator = torch.Generator().manual_seed(17)
    num_experts = len(size.counts)
    rows = torch.randn(sum(size.counts) + size.rest, size.width, generator=generator).to(dtype)
    shape = (num_experts, size.inner, size.width)
    gate, up = (torch.randn(shape, generator=generator).div(size.width**0.5).to(dtype) for _ in range(2))
    down = torch.randn(num_experts, size.width, size.inner, generator=generator).div(size.inner**0.5).to(dtype)
    counts = torch.tensor(size.counts, dtype=torch.int32)
    wanted = (0, 2, 3, 4) if size.gated else (0, 3, 4)
    return Sample((rows, counts, gate if size.gated else None, up, down), wanted=wanted)


def mlp_checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    rows, counts, _, up, _ = make_mlp(Ragged((3, 0, 2), 1, 6, 4), dtype).args
    dout = torch.randn(rows.shape[0], 4).to(dtype)
    ops = torch.ops.dist_llm
    return [
        (ops.moe_grouped_linear, (rows.clone().requires_grad_(), counts, up.clone().requires_grad_())),
        (ops.moe_grouped_linear_backward, (dout, rows, counts, up, True, True)),
        (ops.moe_grouped_linear_backward, (dout, rows, counts, up, False, True)),
    ]


# expert_mlp in fp32 is in test_moe.py: with another number of threads torch's fp32 product can add in another order.
CASES = [
    Case("moe_route", ROUTE_IMPLS, ROUTE_SIZES, make_route, route_checks, gpu_sizes=ROUTE_GPU_SIZES),
    Case("moe_permute", PERMUTE_IMPLS, PERMUTE_SIZES, make_permute, permute_checks, gpu_sizes=PERMUTE_GPU_SIZES),
    Case("moe_unpermute", UNPERMUTE_IMPLS, PERMUTE_SIZES, make_unpermute, unpermute_checks, gpu_sizes=PERMUTE_GPU_SIZES),
    Case("moe_unpermute", UNPERMUTE_IMPLS, PERMUTE_SIZES, make_unpermute_unweighted, unpermute_unweighted_checks),
    Case("expert_mlp", MLP_IMPLS, MLP_SIZES, make_mlp, mlp_checks, dtypes=(torch.bfloat16,), gpu_sizes=MLP_GPU_SIZES),
]
