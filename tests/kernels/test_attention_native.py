"""The compiled attention kernels against the definition, by their error from float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_llm.kernels.attention.block import attention_reference_backward, attention_reference_block
from dist_llm.kernels.attention.native import (
    attention_native,
    attention_native_backward,
    attention_native_block,
    attention_native_lse,
    why_not_native,
)
from dist_llm.kernels.attention.reference import attention_reference_lse

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]

needs_native = pytest.mark.skipif(why_not_native(CPU, torch.float32) is not None, reason=str(why_not_native(CPU, torch.float32)))

# B, T, S, N, K, H
SIZES = {
    "several blocks": (2, 200, 200, 3, 3, 64),
    "head dim 40": (2, 123, 123, 4, 2, 40),
    "head dim 1": (1, 65, 65, 2, 2, 1),
    "head dim 33": (1, 70, 70, 2, 1, 33),
    "head dim 256": (1, 67, 67, 2, 1, 256),
    "one token": (3, 1, 1, 2, 2, 32),
    "one token after many": (2, 1, 150, 4, 2, 64),
    "two tokens after many": (1, 2, 150, 4, 2, 48),
    "some tokens after many": (1, 19, 300, 2, 2, 64),
    "all heads to one": (1, 131, 131, 20, 1, 48),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "bidirectional": {"causal": False},
    "documents": {"causal": True, "documents": 31},
    "one-token documents": {"causal": True, "documents": 1},
    "bidirectional documents": {"causal": False, "documents": 70},
    "window": {"causal": True, "window": 37},
    "window of one": {"causal": True, "window": 1},
    "bidirectional window": {"causal": False, "window": 20},
    "alibi": {"causal": True, "alibi": True},
    "soft cap": {"causal": True, "soft_cap": 1.5},
    "negative scale": {"causal": True, "scale": -0.3},
    "everything": {"causal": False, "documents": 90, "window": 40, "alibi": True, "soft_cap": 2.0, "scale": 0.2},
}


def make_inputs(size: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v, and gradients of the result and of its log-sum-exp."""
    b, t, s, n, k, h = size
    generator = torch.Generator().manual_seed(11)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h), (b, t, n, h))
    return [*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes), torch.randn(b, n, t, generator=generator)]


def make_options(size: tuple[int, ...], options: dict[str, Any]) -> dict[str, Any]:
    b, _, s, n, _, _ = size
    made = dict(options)
    length = made.pop("documents", None)
    if length is not None:
        # Cut differently in each row.
        made["doc_ids"] = (torch.arange(s)[None] + 3 * torch.arange(b)[:, None]) // length
    if made.pop("alibi", False):
        made["alibi_slopes"] = 0.5 ** torch.arange(1, n + 1)
    return made


def results(fn: Callable[..., Any], inputs: list[torch.Tensor], options: dict[str, Any]) -> list[torch.Tensor]:
    """The result, its log-sum-exp, dq, dk, dv."""
    *qkv, dout, dlse = inputs
    leaves = [t.clone().requires_grad_() for t in qkv]
    out, lse = fn(*leaves, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, [dout, dlse.to(lse.dtype)])]


def assert_at_most_twice_the_reference_error(size: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs, options = make_inputs(size, dtype), make_options(size, options)
    exact = results(attention_reference_lse, [t.double() for t in inputs], options)
    expected = results(attention_reference_lse, inputs, options)
    measured = results(attention_native_lse, inputs, options)
    # The reference rounds once, from fp32. With few numbers its largest error is luck, and where a query has one key its gradient is
    # a difference of equal numbers, exactly zero here and noise there. What follows from two fp32 roundings of the terms of a score,
    # which change a probability by that factor, and from one rounding of the largest number of a result is therefore no error.
    # The three gradients share their terms, so the largest of them is their measure.
    q, k, *_ = (t.double().abs() for t in inputs)
    terms = torch.einsum("btnh,bsnh->bnts", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)).max().item()
    score_error = 2 * torch.finfo(torch.float32).eps * terms * abs(options.get("scale", size[-1] ** -0.5))
    largest = [t.abs().max().item() for t in exact]
    scales = [largest[0], max(1.0, largest[1]), *([max(largest[2:])] * 3)]
    for index, (ours, theirs, truth) in enumerate(zip(measured, expected, exact, strict=True)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.isfinite(ours).all()
        unit = torch.finfo(ours.dtype).eps
        luck = (score_error + unit) * scales[index]
        error, bound = (ours.double() - truth).abs().max().item(), 2 * (theirs.double() - truth).abs().max().item()
        assert error <= max(bound, luck), f"result {index} of {size} {dtype} {options}: {error:.3g} > {max(bound, luck):.3g}"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_native_error_is_at_most_twice_the_reference_error(size: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_at_most_twice_the_reference_error(size, dtype, options)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_neither_overflow_nor_lose_the_largest(dtype: torch.dtype) -> None:
    q, k, v, _, _ = make_inputs((1, 150, 150, 2, 2, 32), dtype)
    out, lse = attention_native_lse(q * 30, k * 30, v, causal=True)
    expected, expected_lse = attention_reference_lse((q * 30).double(), (k * 30).double(), v.double(), causal=True)
    assert expected_lse.max() > 1000  # exp of it is infinite
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 2e-3)


@needs_native
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_of_any_size_beyond_the_keys_is_none(causal: bool) -> None:
    inputs = make_inputs((2, 70, 90, 2, 2, 16), torch.float32)
    whole = results(attention_native_lse, inputs, {"causal": causal})
    for window in (90, 2**31, sys.maxsize):
        for ours, same in zip(results(attention_native_lse, inputs, {"causal": causal, "window": window}), whole, strict=True):
            assert torch.equal(ours, same)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slopes_that_favour_far_keys_do_not_overflow_in_lanes_without_a_query(dtype: torch.dtype) -> None:
    # 100 queries: 12 lanes of the last vector have none. At a distance of 99, 2^(99 / ln 2) is infinite.
    inputs, options = make_inputs((1, 100, 100, 1, 1, 32), dtype), {"causal": True, "alibi_slopes": torch.tensor([-1.0])}
    exact = results(attention_reference_lse, [t.double() for t in inputs], options)
    for ours, truth in zip(results(attention_native_lse, inputs, options), exact, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=(2e-5 if dtype == torch.float32 else 2e-2) * truth.abs().max().item())


@needs_native
def test_merging_two_halves_by_their_log_sum_exp_equals_the_whole_with_gradients() -> None:
    def in_halves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outs, lses = zip(
            *(attention_native_lse(q, k[:, part], v[:, part], causal=False) for part in (slice(0, 50), slice(50, 128))), strict=True
        )
        weights = torch.stack(lses).softmax(0).transpose(2, 3)[..., None]
        return (torch.stack(outs) * weights).sum(0)

    *qkv, dout, _ = make_inputs((2, 90, 128, 4, 2, 24), torch.float32)
    leaves = [t.clone().requires_grad_() for t in qkv]
    merged, whole = in_halves(*leaves), attention_native(*leaves, causal=False)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)
    for ours, same in zip(torch.autograd.grad(merged, leaves, dout), torch.autograd.grad(whole, leaves, dout), strict=True):
        torch.testing.assert_close(ours, same, rtol=1e-4, atol=2e-6)


@needs_native
@pytest.mark.parametrize("used", ["result", "log-sum-exp"])
def test_either_result_alone_has_a_gradient(used: str) -> None:
    *qkv, dout, dlse = make_inputs((1, 40, 40, 2, 1, 16), torch.float32)
    gradients = []
    for fn in (attention_native_lse, attention_reference_lse):
        leaves = [t.clone().requires_grad_() for t in qkv]
        out, lse = fn(*leaves, causal=True)
        gradients.append(torch.autograd.grad(*((out, leaves, dout) if used == "result" else (lse, leaves, dlse)), materialize_grads=True))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


@needs_native
@pytest.mark.parametrize("num_tokens", [1, 77])
def test_native_reads_slices_of_a_cache_and_of_a_fused_projection_in_place(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(2, num_tokens, 8, 32, generator=generator)  # 4 query, 2 key, 2 value heads
    cache_k, cache_v = (torch.randn(2, 200, 2, 32, generator=generator) for _ in range(2))
    cases = [(fused[:, :, :4], cache_k[:, :150], cache_v[:, :150]), (fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:])]
    for views in cases:
        assert not any(t.is_contiguous() for t in views)
        whole = results(
            attention_native_lse,
            [*(t.contiguous() for t in views), torch.ones(2, num_tokens, 4, 32), torch.ones(2, 4, num_tokens)],
            {"causal": True},
        )
        leaves = [t.detach().requires_grad_() for t in views]
        out, lse = attention_native_lse(*leaves, causal=True)
        assert torch.equal(out, whole[0])
        assert torch.equal(lse, whole[1])
        for ours, same in zip(torch.autograd.grad([out.sum(), lse.sum()], leaves), whole[2:], strict=True):
            assert torch.equal(ours, same)


@needs_native
def test_native_takes_head_dims_that_are_not_neighbours() -> None:
    q, k, v, dout, dlse = make_inputs((2, 30, 30, 2, 2, 16), torch.float32)
    scattered = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v, dout)]
    assert all(t.stride(-1) != 1 for t in scattered)
    for ours, same in zip(
        results(attention_native_lse, [*scattered, dlse], {"causal": True}),
        results(attention_native_lse, [q, k, v, dout, dlse], {"causal": True}),
        strict=True,
    ):
        assert torch.equal(ours, same)


@needs_native
def test_tokens_behind_a_cached_prefix_equal_the_whole_row() -> None:
    (q, k, v, _, _), options = make_inputs((2, 140, 140, 4, 2, 40), torch.float32), {"causal": True, "window": 90}
    whole, lse = attention_native_lse(q, k, v, **options)
    for count in (1, 2, 5, 100):
        last, last_lse = attention_native_lse(q[:, -count:], k, v, **options)
        torch.testing.assert_close(last, whole[:, -count:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(last_lse, lse[:, :, -count:], rtol=1e-6, atol=1e-6)


@needs_native
def test_queries_without_keys_get_zeros_and_an_infinite_log_sum_exp() -> None:
    out, lse = attention_native_lse(torch.randn(1, 3, 2, 8), torch.randn(1, 0, 2, 8), torch.randn(1, 0, 2, 8), causal=False)
    assert torch.equal(out, torch.zeros(1, 3, 2, 8))
    assert torch.equal(lse, torch.full((1, 2, 3), float("-inf")))


@needs_native
@pytest.mark.parametrize("num_queries", [1, 90])
def test_native_keeps_a_nan_visible(num_queries: int) -> None:
    q, k, v, _, _ = make_inputs((2, num_queries, 90, 2, 2, 40), torch.bfloat16)
    q[0, -1, 1, 39] = float("nan")
    out = attention_native(q, k, v, causal=True)
    assert out[0, -1, 1].isnan().all()
    out[0, -1, 1] = 0
    assert torch.isfinite(out).all()


@needs_native
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"doc_ids": torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])},
            RuntimeError,
            "must not fall along a row: row 0 has 1 before 0 at token 3",
        ),
        ({"doc_ids": torch.zeros(2, 4)}, RuntimeError, "doc_ids must be int32 or int64, not Float"),
        ({"window": 0}, ValueError, r"window \(0\) must be at least 1"),
        ({"soft_cap": 0.0}, ValueError, r"soft_cap \(0\.0\) must be positive"),
        ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes \(3,\) must have one slope for each of the 2 query heads"),
        ({"alibi_slopes": torch.zeros(2, requires_grad=True)}, ValueError, "detach them"),
    ],
)
def test_native_refuses_options_it_cannot_follow(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v, _, _ = make_inputs((2, 4, 4, 2, 2, 8), torch.float32)
    with pytest.raises(error, match=message):
        attention_native(q, k, v, causal=True, **change)


# Documents of keys and of queries that stand elsewhere in the row: ids in common, missing on either side, before and behind all.
ELSEWHERE = {
    "equal": lambda tokens, first: torch.full((tokens,), 3),
    "none in common": lambda tokens, first: torch.arange(tokens) // 9 * 2 + first,
    "some in common": lambda tokens, first: torch.arange(tokens) // (7 + 16 * first) + 2 * first,
    "far apart": lambda tokens, first: (torch.arange(tokens) >= tokens // 2).long() * (50 + first) + 4,
    "one token each": lambda tokens, first: torch.arange(tokens) + 20 * first,
    "all behind": lambda tokens, first: torch.full((tokens,), 9 if first else 4),
    "all before": lambda tokens, first: torch.full((tokens,), 4 if first else 9),
}
# B, T, S, N, K, H
ELSEWHERE_SIZES = {
    "more queries than keys": (2, 200, 100, 4, 2, 40),
    "more keys than queries": (2, 70, 301, 3, 3, 64),
    "one key": (1, 65, 1, 2, 1, 8),
    "two queries": (2, 2, 150, 4, 2, 48),
    "all heads to one": (1, 131, 67, 20, 1, 24),
}


def elsewhere(size: tuple[int, ...], documents: str) -> dict[str, Any]:
    b, t, s, *_ = size
    shift = torch.arange(b)[:, None]  # rows differ
    keys, queries = (ELSEWHERE[documents](tokens, first)[None] + shift for tokens, first in ((s, 0), (t, 1)))
    return {"causal": False, "doc_ids": keys.int(), "query_doc_ids": queries.int()}


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("documents", ELSEWHERE)
@pytest.mark.parametrize("size", ELSEWHERE_SIZES.values(), ids=ELSEWHERE_SIZES)
def test_queries_from_elsewhere_see_the_keys_of_their_document(size: tuple[int, ...], documents: str, dtype: torch.dtype) -> None:
    *qkv, dout, dlse = make_inputs(size, dtype)
    options = elsewhere(size, documents)
    sees_none = ~(options["query_doc_ids"][:, :, None] == options["doc_ids"][:, None, :]).any(-1)
    dlse = dlse.masked_fill(sees_none[:, None], 0.0)  # -inf has no gradient

    def finite(fn: Callable[..., Any], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        out, lse, *grads = results(fn, [*inputs, dlse], options)
        assert torch.equal(lse == float("-inf"), sees_none[:, None].expand(lse.shape))
        assert not out[sees_none].any()
        assert not grads[0][sees_none].any()
        return [out, lse.masked_fill(lse == float("-inf"), 0.0), *grads]

    exact = finite(attention_reference_lse, [t.double() for t in (*qkv, dout)])
    expected = finite(attention_reference_lse, [*qkv, dout])
    largest = max(t.abs().max().item() for t in exact)
    for index, (ours, theirs, truth) in enumerate(zip(finite(attention_native_lse, [*qkv, dout]), expected, exact, strict=True)):
        assert torch.isfinite(ours).all()
        error, bound = (ours.double() - truth).abs().max().item(), 2 * (theirs.double() - truth).abs().max().item()
        # Eight fp32 roundings of the largest number, for results that cancel to nothing, or one in the dtype of the result.
        luck = max(8 * torch.finfo(torch.float32).eps, torch.finfo(ours.dtype).eps) * largest
        assert error <= max(bound, luck), f"result {index}: {error:.3g} > {max(bound, luck):.3g}"


PARTS = [slice(0, 37), slice(37, 38), slice(38, 130)]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("documents", [False, True], ids=["one text", "documents"])
def test_blocks_of_keys_add_up_to_the_gradients_of_the_whole(documents: bool, soft_cap: float | None, dtype: torch.dtype) -> None:
    size = (2, 90, 130, 4, 2, 40)
    q, k, v, dout, _ = make_inputs(size, dtype)
    whole: dict[str, Any] = elsewhere(size, "some in common") if documents else {"causal": False}
    whole.update(soft_cap=soft_cap, scale=0.2)
    exact_inputs = [t.double() for t in (q, k, v, dout)]
    exact = results(attention_reference_lse, [*exact_inputs, torch.zeros(2, 4, 90)], whole) if not documents else None
    exact_out, exact_lse = attention_reference_block(*exact_inputs[:3], **whole)
    if exact is None:
        leaves = [t.clone().requires_grad_() for t in exact_inputs[:3]]
        exact = [exact_out, exact_lse, *torch.autograd.grad(attention_reference_lse(*leaves, **whole)[0], leaves, exact_inputs[3])]
    # The reference's own backward, on all keys at once, equals autograd in float64.
    for ours, truth in zip(
        attention_reference_backward(exact_inputs[3], *exact_inputs[:3], exact_out, exact_lse, **whole), exact[2:], strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)

    out, lse = attention_native_block(q, k, v, **whole)
    assert out.dtype == torch.float32
    rounded = out.to(dtype)
    for backward in (attention_native_backward, attention_reference_backward):
        dq, dks, dvs = torch.zeros(q.shape), [], []
        for part in PARTS:
            options = {**whole, "doc_ids": whole["doc_ids"][:, part]} if documents else whole
            part_dq, part_dk, part_dv = backward(dout, q, k[:, part], v[:, part], rounded, lse, **options)
            assert part_dq.dtype == part_dk.dtype == part_dv.dtype == torch.float32
            dq += part_dq
            dks.append(part_dk)
            dvs.append(part_dv)
        for ours, truth in zip((out, dq, torch.cat(dks, 1), torch.cat(dvs, 1)), (exact[0], *exact[2:]), strict=True):
            # fp32: rounding of sums. bf16: the result and the probabilities are rounded to it, a few parts in a thousand of a term.
            bound = (2e-6 if dtype == torch.float32 else 8e-3) * max(t.abs().max().item() for t in exact[2:])
            assert (ours.double() - truth).abs().max() <= bound


@needs_native
@pytest.mark.parametrize("num_queries", [2, 90])
def test_a_block_is_the_result_before_it_is_rounded(num_queries: int) -> None:
    q, k, v, _, _ = make_inputs((2, num_queries, 90, 4, 2, 40), torch.bfloat16)
    fine, coarse = attention_native_block(q, k, v, causal=True)[0], attention_native(q, k, v, causal=True)
    assert torch.equal(fine.bfloat16(), coarse)
    assert not torch.equal(fine, coarse.float())


@pytest.mark.parametrize("fn", [attention_native_lse, attention_native_block, attention_reference_lse, attention_reference_block])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_ids": None}, "query_doc_ids come with doc_ids"),
        ({"causal": True}, r"the queries have no place among the keys, so causal \(True\)"),
        ({"query_doc_ids": torch.zeros(2, 3, dtype=torch.int32)}, r"query_doc_ids \(2, 3\) torch.int32 must be \(B, T\) = \(2, 5\)"),
        ({"query_doc_ids": torch.zeros(2, 5, dtype=torch.int64)}, r"in the dtype of doc_ids, torch\.int32"),
    ],
)
def test_documents_of_queries_that_fit_nothing_are_refused(fn: Callable[..., Any], change: dict[str, Any], message: str) -> None:
    q, k, v, _, _ = make_inputs((2, 5, 4, 2, 2, 8), torch.float32)
    ids = {"causal": False, "doc_ids": torch.zeros(2, 4, dtype=torch.int32), "query_doc_ids": torch.zeros(2, 5, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        fn(q, k, v, **{**ids, **change})


@needs_native
def test_native_refuses_documents_of_queries_that_fall() -> None:
    q, k, v, _, _ = make_inputs((1, 3, 4, 2, 2, 8), torch.float32)
    with pytest.raises(RuntimeError, match="query_doc_ids must not fall along a row: row 0 has 2 before 1 at token 2"):
        attention_native_lse(q, k, v, causal=False, doc_ids=torch.zeros(1, 4).long(), query_doc_ids=torch.tensor([[0, 2, 1]]))


@pytest.mark.parametrize("backward", [attention_native_backward, attention_reference_backward])
def test_a_result_of_other_queries_is_refused(backward: Callable[..., Any]) -> None:
    q, k, v, _, _ = make_inputs((2, 5, 4, 2, 2, 8), torch.float32)
    with pytest.raises(ValueError, match=r"lse \(2, 5, 2\) torch.float32 must be \(B, N, T\) = \(2, 2, 5\)"):
        backward(q, q, k, v, q, torch.zeros(2, 5, 2), causal=False)
    with pytest.raises(ValueError, match=r"out \(2, 4, 2, 8\) torch.float32 must be like q, \(2, 5, 2, 8\)"):
        backward(q, q, k, v, k, torch.zeros(2, 2, 5), causal=False)


@pytest.mark.parametrize("fn", [attention_native, attention_reference_lse])
def test_no_key_and_value_heads_are_refused(fn: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"query heads \(2\) must be a multiple of key and value heads \(0\)"):
        fn(torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 0, 8), torch.zeros(1, 4, 0, 8), causal=True)


@needs_native
def test_native_refuses_other_dtypes() -> None:
    q, k, v, _, _ = make_inputs((1, 4, 4, 2, 2, 8), torch.float32)
    with pytest.raises(RuntimeError, match="takes q in fp32 or bf16, not Double"):
        attention_native(q.double(), k.double(), v.double(), causal=True)
    with pytest.raises(RuntimeError, match="k is BFloat16 but q is Float"):
        attention_native(q, k.bfloat16(), v.bfloat16(), causal=True)


def test_why_not_native_names_the_dtypes_it_takes() -> None:
    assert "float64" in str(why_not_native(CPU, torch.float64))
    assert "torch.bfloat16" in str(why_not_native(CPU, torch.float64))
