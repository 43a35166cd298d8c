"""Attention whose columns are spread over ranks, against the whole row in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_llm.comm.context import SINGLE, Group, ParallelContext
from dist_llm.comm.ledger import CommLedger
from dist_llm.kernels.attention import BLOCK_BACKWARD_IMPLS, BLOCK_IMPLS, IMPLS
from dist_llm.kernels.attention.block import attention_reference_backward, attention_reference_block
from dist_llm.kernels.attention.native import why_not_native
from dist_llm.kernels.attention.reference import attention_reference
from dist_llm.kernels.impl import select
from dist_llm.layers.all_to_all_attention import all_to_all_attention
from dist_llm.layers.attention import AttentionFn
from dist_llm.layers.ring_attention import ring_attention
from dist_llm.parallel.ranks import run_on_ranks
from dist_llm.topology.sequence import columns_of_rank

CPU = torch.device("cpu")

# B, T of the whole row, N, K, H
SIZES = {
    "grouped": (2, 72, 4, 2, 40),  # chunks of 9 columns at cp 4, of 18 at cp 2
    "all heads to one": (1, 40, 4, 1, 16),  # chunks of 5 and 10
    "every head its own": (1, 264, 8, 8, 32),  # chunks of 33 and 66: more than one block of queries
    "runs of heads that straddle ranks": (1, 24, 12, 6, 8),  # at cp 4 a rank's three query heads read two key heads
}
# Where documents begin, as fractions of the row: on chunk borders (eighths), inside chunks, one token long.
DOCUMENTS: dict[str, Callable[[int, int], torch.Tensor | None]] = {
    "one text": lambda rows, columns: None,
    "documents": lambda rows, columns: _cut([columns // 8, columns // 3, columns // 3 + 1, columns // 2, columns - 1], rows, columns),
    "a document spans the row": lambda rows, columns: torch.full((rows, columns), 7, dtype=torch.int32),
    "one-token documents": lambda rows, columns: torch.arange(columns).repeat(rows, 1),
}


def _cut(borders: list[int], rows: int, columns: int) -> torch.Tensor:
    """Ids of documents that begin at the borders, a column later in each further row."""
    positions = torch.arange(columns)[None] - torch.arange(rows)[:, None]
    return sum((positions >= border).int() for border in borders) + torch.zeros(rows, columns, dtype=torch.int32)


def columns(size: int, rank: int, length: int, kind: str) -> torch.Tensor:
    return torch.cat([torch.arange(c.start, c.stop) for c in columns_of_rank(length, size, rank, zigzag=kind == "ring")])


def make_inputs(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    b, t, n, k, h = size
    generator = torch.Generator().manual_seed(5)
    shapes = {"q": (b, t, n, h), "k": (b, t, k, h), "v": (b, t, k, h), "dout": (b, t, n, h)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def results(fn: AttentionFn, inputs: dict[str, torch.Tensor], doc_ids: torch.Tensor | None, **options: Any) -> dict[str, torch.Tensor]:
    leaves = [inputs[name].clone().requires_grad_() for name in ("q", "k", "v")]
    out = fn(*leaves, causal=True, doc_ids=doc_ids, **options)
    dq, dk, dv = torch.autograd.grad(out, leaves, inputs["dout"])
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def attention_of(kind: str, name: str, cp: Group, dtype: torch.dtype) -> AttentionFn:
    if kind == "ring":
        forward, backward = (select(table, name, CPU, dtype).fn for table in (BLOCK_IMPLS, BLOCK_BACKWARD_IMPLS))
        return ring_attention(forward, backward, cp)
    return all_to_all_attention(select(IMPLS, name, CPU, dtype).fn, cp)


# Of a size; scale is given where nothing else is, so that it cannot be lost on the way.
OPTIONS: dict[str, Callable[[tuple[int, ...]], dict[str, Any]]] = {
    "scale": lambda size: {"scale": 0.2},
    "soft cap": lambda size: {"soft_cap": 1.5},
    "window and ALiBi": lambda size: {"window": 11, "alibi_slopes": 0.5 ** torch.arange(1, size[2] + 1)},
}


def part_of_row(ctx: ParallelContext, kind: str, name: str, dtype: torch.dtype, options: str) -> dict[str, torch.Tensor]:
    """This rank's columns of every size and documents, twice."""
    cp, answers = ctx.cp, {}
    fn = attention_of(kind, name, cp, dtype)
    for label, size in SIZES.items():
        mine = columns(cp.size, cp.rank, size[1], kind)
        inputs = {key: t[:, mine] for key, t in make_inputs(size, dtype).items()}
        for documents, make in DOCUMENTS.items():
            doc_ids = make(size[0], size[1])
            local_ids = None if doc_ids is None else doc_ids[:, mine]
            first, again = (results(fn, inputs, local_ids, **OPTIONS[options](size)) for _ in range(2))
            for key, value in first.items():
                assert torch.equal(value, again[key]), f"{key} of {label}, {documents} has other bits the second time"
                answers[f"{label}/{documents}/{key}"] = value
    return answers


def whole_row(parts: list[dict[str, torch.Tensor]], name: str, length: int, kind: str) -> torch.Tensor:
    pieces = torch.cat([part[name] for part in parts], dim=1)
    where = torch.cat([columns(len(parts), rank, length, kind) for rank in range(len(parts))])
    return torch.empty_like(pieces).index_copy_(1, where, pieces)


NAMES = ["reference", *(["native"] if why_not_native(CPU, torch.float32) is None else [])]
KINDS_AND_NAMES = [*(("ring", name) for name in NAMES), *(("all_to_all", name) for name in [*NAMES, "sdpa"])]


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize(("kind", "name"), KINDS_AND_NAMES)
def test_columns_of_ranks_make_the_row_of_one_process(kind: str, name: str, cp: int) -> None:
    parts = run_on_ranks(part_of_row, cp=cp, args=(kind, name, torch.float32, "scale"))
    for label, size in SIZES.items():
        inputs = {key: t.double() for key, t in make_inputs(size, torch.float32).items()}
        for documents, make in DOCUMENTS.items():
            exact = results(attention_reference, inputs, make(size[0], size[1]), **OPTIONS["scale"](size))
            largest = max(t.abs().max().item() for t in exact.values())
            for key, truth in exact.items():
                # fp32 rounding of scores, probabilities and sums, measured at 4e-7 to 1e-6. The gradients share their terms: where
                # one cancels to nothing (dq and dk of one-token documents) the rounding of the terms is left.
                unit = truth.abs().max().item() or largest
                error = (whole_row(parts, f"{label}/{documents}/{key}", size[1], kind).double() - truth).abs().max().item() / unit
                assert error <= 2e-6, f"{key} of {label}, {documents}: {error:.3g}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["ring", "all_to_all"])
def test_bf16_error_over_ranks_is_at_most_twice_that_of_one_process(kind: str, name: str) -> None:
    parts = run_on_ranks(part_of_row, cp=4, args=(kind, name, torch.bfloat16, "scale"))
    for label, size in SIZES.items():
        inputs = make_inputs(size, torch.bfloat16)
        for documents, make in DOCUMENTS.items():
            doc_ids, options = make(size[0], size[1]), OPTIONS["scale"](size)
            exact = results(attention_reference, {key: t.double() for key, t in inputs.items()}, doc_ids, **options)
            single = results(select(IMPLS, name, CPU, torch.bfloat16).fn, inputs, doc_ids, **options)
            largest = max(t.abs().max().item() for t in exact.values())
            # One rounding of the largest number is no error: one process can be exact by luck. With all-to-all the gradients of the
            # copies of a key-value head are rounded before they are summed, one rounding each.
            copies = size[2] // size[3] if kind == "all_to_all" and size[3] % 4 != 0 else 0
            luck = (1 + copies) * torch.finfo(torch.bfloat16).eps / 2 * largest
            for key, truth in exact.items():
                ours = whole_row(parts, f"{label}/{documents}/{key}", size[1], kind)
                assert ours.dtype == torch.bfloat16
                error, alone = ((t.double() - truth).abs().max().item() for t in (ours, single[key]))
                assert error <= max(2 * alone, luck), f"{key} of {label}, {documents}: {error:.3g} over ranks, {alone:.3g} alone"


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize(("kind", "options"), [("ring", "soft cap"), ("all_to_all", "soft cap"), ("all_to_all", "window and ALiBi")])
def test_float64_over_ranks_is_exact(kind: str, options: str, cp: int) -> None:
    parts = run_on_ranks(part_of_row, cp=cp, args=(kind, "reference", torch.float64, options))
    for label, size in SIZES.items():
        for documents, make in DOCUMENTS.items():
            exact = results(attention_reference, make_inputs(size, torch.float64), make(size[0], size[1]), **OPTIONS[options](size))
            for key, truth in exact.items():
                measured = whole_row(parts, f"{label}/{documents}/{key}", size[1], kind)
                # Float64 rounding of sums of numbers near one; a wrong step would be many orders above it.
                assert (measured - truth).abs().max() <= 1e-12, f"{key} of {label}, {documents}"


def traffic(ctx: ParallelContext, kind: str, dtype: torch.dtype) -> dict[str, dict[str, tuple[int, int]]]:
    """Calls and bytes that leave this rank, forward and backward, by collective."""
    size = SIZES["grouped"]
    mine = columns(ctx.cp.size, ctx.cp.rank, size[1], kind)
    *qkv, dout = (t[:, mine] for t in make_inputs(size, dtype).values())
    leaves = [t.clone().requires_grad_() for t in qkv]
    doc_ids = torch.zeros(dout.shape[:2], dtype=torch.int32)
    answers = {}
    with CommLedger() as ledger:
        out = attention_of(kind, "reference", ctx.cp, dtype)(*leaves, causal=True, doc_ids=doc_ids)
        answers["forward"] = ledger.take_counts()
        out.backward(dout)
        answers["backward"] = ledger.take_counts()
    return {
        name: {collective: (sent.calls, int(sent.wire_bytes)) for (_, collective), sent in counts.items() if sent.wire_bytes > 0}
        for name, counts in answers.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cp", [2, 4])
def test_bytes_on_the_wire_are_those_of_the_docstrings(cp: int, dtype: torch.dtype) -> None:
    b, t, n, k, h = SIZES["grouped"]
    t, width, others = t // cp, dtype.itemsize, cp - 1
    gathered = (1, others * b * t * 4)
    for answer in run_on_ranks(traffic, cp=cp, args=("ring", dtype)):
        assert answer == {
            "forward": {"all_gather": gathered, "send": (others, others * 2 * b * t * k * h * width)},
            "backward": {"send": (2 * others, others * 2 * b * t * k * h * (width + 4))},
        }
    copied = max(k, cp)  # two key-value heads: one a rank at cp 2, each on two ranks at cp 4
    twice = (2, others * b * t * ((n + 2 * copied) + n) * h * width // cp)
    for answer in run_on_ranks(traffic, cp=cp, args=("all_to_all", dtype)):
        assert answer == {"forward": {"all_gather": gathered, "all_to_all": twice}, "backward": {"all_to_all": twice}}


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_a_group_of_one_is_attention_as_it_was(documents: str) -> None:
    size = SIZES["grouped"]
    inputs, doc_ids = make_inputs(size, torch.float64), DOCUMENTS[documents](size[0], size[1])
    expected = results(attention_reference, inputs, doc_ids)
    for key, value in results(all_to_all_attention(attention_reference, SINGLE), inputs, doc_ids).items():
        assert torch.equal(value, expected[key])
    for key, value in results(ring_attention(attention_reference_block, attention_reference_backward, SINGLE), inputs, doc_ids).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12)


FOUR = Group(rank=0, size=4, ranks=(0, 1, 2, 3), name="cp")


def test_heads_that_do_not_divide_are_refused_with_the_ring_as_the_way_out() -> None:
    attend = all_to_all_attention(attention_reference, FOUR)
    with pytest.raises(ValueError, match=r"the 6 query heads of this rank must be divisible by cp \(4\); use parallel\.cp_kind = ring"):
        attend(torch.zeros(1, 4, 6, 8), torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3, 8), causal=True)


@pytest.mark.parametrize(
    ("columns_here", "options", "message"),
    [
        (4, {"causal": False}, "not causal=False"),
        (4, {"causal": True, "window": 3}, "window=3.*use parallel.cp_kind = all_to_all"),
        (4, {"causal": True, "alibi_slopes": torch.ones(2)}, "alibi_slopes=given"),
        (5, {"causal": True}, "5 queries and 5 keys must be the same even number"),
        (4, {"causal": True, "doc_ids": torch.zeros(1, 16)}, r"doc_ids \(1, 16\) must be \(B, T\) = \(1, 4\)"),
    ],
)
def test_the_ring_refuses_what_it_cannot_compute(columns_here: int, options: dict[str, Any], message: str) -> None:
    attend = ring_attention(attention_reference_block, attention_reference_backward, FOUR)
    q = torch.zeros(1, columns_here, 2, 8)
    with pytest.raises(ValueError, match=message):
        attend(q, q, q, **options)
