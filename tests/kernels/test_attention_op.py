"""Attention: the definition by hand-made loops, and the fused back end against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from dist_llm.kernels.attention.reference import attention_reference, attention_reference_lse
from dist_llm.kernels.attention.sdpa import attention_sdpa

# B, T, S, N, K, H
SIZES = {
    "multi-head": (2, 7, 7, 3, 3, 8),
    "grouped": (2, 9, 9, 4, 2, 16),
    "multi-query": (1, 5, 5, 4, 1, 40),
    "one token": (3, 1, 1, 2, 2, 4),
    "decoding one": (2, 1, 6, 4, 2, 8),
    "decoding three": (2, 3, 11, 4, 2, 8),
}


def make_inputs(
    size: tuple[int, ...], dtype: torch.dtype, *, documents: bool
) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor]:
    b, t, s, n, k, h = size
    generator = torch.Generator().manual_seed(3)
    q, keys, values, dout = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, h), (b, t, n, h))
    )
    # Documents of about three tokens, cut differently in each row.
    doc_ids = (torch.arange(s)[None] + torch.arange(b)[:, None]) // 3 if documents else None
    return [q, keys, values], doc_ids, dout


def results(fn, inputs: list[torch.Tensor], dout: torch.Tensor, **options) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = fn(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def by_loops(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, doc_ids: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """One query at a time, from the definition alone."""
    out = torch.zeros_like(q)
    num_batch, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    for b in range(num_batch):
        for t in range(num_queries):
            position = num_keys - num_queries + t
            for n in range(num_heads):
                kv = n // (num_heads // num_kv_heads)
                seen = [
                    s
                    for s in range(num_keys)
                    if (not causal or s <= position) and (doc_ids is None or doc_ids[b, s] == doc_ids[b, position])
                ]
                scores = [math.exp(scale * float(q[b, t, n] @ k[b, s, kv])) for s in seen]
                out[b, t, n] = sum(e * v[b, s, kv] for e, s in zip(scores, seen, strict=True)) / sum(scores)
    return out


@pytest.mark.parametrize("documents", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_reference_is_softmax_over_the_visible_keys(size: tuple[int, ...], causal: bool, documents: bool) -> None:
    inputs, doc_ids, _ = make_inputs(size, torch.float64, documents=documents)
    expected = by_loops(*inputs, causal=causal, doc_ids=doc_ids, scale=0.3)
    torch.testing.assert_close(attention_reference(*inputs, causal=causal, doc_ids=doc_ids, scale=0.3), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_sdpa_equals_reference_forward_and_backward(size: tuple[int, ...], causal: bool, documents: bool, dtype: torch.dtype) -> None:
    inputs, doc_ids, dout = make_inputs(size, dtype, documents=documents)
    options = {"causal": causal, "doc_ids": doc_ids, "scale": size[-1] ** -0.5}
    exact = results(attention_reference, [t.double() for t in inputs], dout.double(), **options)
    for index, (ours, truth) in enumerate(zip(results(attention_sdpa, inputs, dout, **options), exact, strict=True)):
        assert ours.dtype == dtype
        # Torch's kernel keeps probabilities in the dtype of its input for the second product, which the reference does not:
        # a few roundings of numbers as large as the largest gradient, which is what the bound allows.
        largest = max(t.abs().max().item() for t in exact)
        assert (ours.double() - truth).abs().max().item() <= 8 * torch.finfo(dtype).eps * largest, f"result {index}"


EXTRAS = {
    "window": {"window": 3},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.0, 1.0])},
    "soft cap": {"soft_cap": 0.7},
    "all": {"window": 4, "alibi_slopes": torch.tensor([0.5, 0.25, 0.0, 1.0]), "soft_cap": 1.3},
}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("size", [SIZES["grouped"], SIZES["multi-query"], SIZES["decoding three"]], ids=str)
def test_reference_follows_window_alibi_and_soft_cap(size: tuple[int, ...], causal: bool, extra: dict) -> None:
    (q, k, v), _, _ = make_inputs(size, torch.float64, documents=False)
    out, lse = attention_reference_lse(q, k, v, causal=causal, scale=0.3, **extra)
    num_queries, num_keys, group = size[1], size[2], size[3] // size[4]
    for t in range(num_queries):
        position = num_keys - num_queries + t
        for n in range(size[3]):
            scores, seen = [], []
            for s in range(num_keys):
                distance = abs(position - s)
                if (causal and s > position) or distance >= extra.get("window", num_keys):
                    continue
                score = 0.3 * float(q[0, t, n] @ k[0, s, n // group])
                if "soft_cap" in extra:
                    score = extra["soft_cap"] * math.tanh(score / extra["soft_cap"])
                if "alibi_slopes" in extra:
                    score -= float(extra["alibi_slopes"][n]) * distance
                scores.append(math.exp(score))
                seen.append(s)
            expected = sum(e * v[0, s, n // group] for e, s in zip(scores, seen, strict=True)) / sum(scores)
            torch.testing.assert_close(out[0, t, n], expected, rtol=1e-12, atol=1e-12)
            assert math.isclose(float(lse[0, n, t]), math.log(sum(scores)), rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("documents", [False, True], ids=["one text", "documents"])
@pytest.mark.parametrize("size", [SIZES["grouped"], SIZES["decoding one"], SIZES["decoding three"]], ids=str)
def test_sdpa_follows_window_alibi_and_soft_cap(size: tuple[int, ...], documents: bool, extra: dict, dtype: torch.dtype) -> None:
    inputs, doc_ids, dout = make_inputs(size, dtype, documents=documents)
    options = {"causal": True, "doc_ids": doc_ids, **extra}
    exact = results(attention_reference, [t.double() for t in inputs], dout.double(), **options)
    largest = max(t.abs().max().item() for t in exact)
    for ours, truth in zip(results(attention_sdpa, inputs, dout, **options), exact, strict=True):
        # As above, and ALiBi's numbers are rounded to the dtype of the scores' mask.
        assert (ours.double() - truth).abs().max().item() <= 8 * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("fn", [attention_reference, attention_sdpa])
def test_default_scale_is_one_over_root_head_dim(fn) -> None:
    inputs, _, _ = make_inputs(SIZES["grouped"], torch.float32, documents=False)
    assert torch.equal(fn(*inputs, causal=True), fn(*inputs, causal=True, scale=0.25))


@pytest.mark.parametrize("fn", [attention_reference, attention_sdpa])
def test_decoding_token_by_token_equals_the_whole_row(fn) -> None:
    (q, k, v), doc_ids, _ = make_inputs(SIZES["grouped"], torch.float64, documents=True)
    for ids in (None, doc_ids):
        whole = fn(q, k, v, causal=True, doc_ids=ids)
        for t in range(q.shape[1]):
            seen = slice(0, t + 1)
            one = fn(q[:, t : t + 1], k[:, seen], v[:, seen], causal=True, doc_ids=None if ids is None else ids[:, seen])
            torch.testing.assert_close(one, whole[:, t : t + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fn", [attention_reference, attention_sdpa])
def test_a_later_token_or_another_document_changes_nothing(fn) -> None:
    (q, k, v), doc_ids, _ = make_inputs((1, 9, 9, 2, 1, 8), torch.float32, documents=True)
    before = fn(q, k, v, causal=True, doc_ids=doc_ids)
    k[:, 6:] = 50.0  # the third document
    v[:, 6:] = 50.0
    after = fn(q, k, v, causal=True, doc_ids=doc_ids)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("fn", [attention_reference, attention_sdpa])
@pytest.mark.parametrize(
    ("q", "k", "ids", "message"),
    [
        ((1, 4, 3, 8), (1, 4, 2, 8), None, r"query heads \(3\) must be a multiple of key and value heads \(2\)"),
        ((1, 5, 2, 8), (1, 4, 2, 8), None, "cannot be more queries than keys"),
        ((1, 4, 2, 8), (1, 4, 2, 4), None, r"takes q \(B, T, N, H\)"),
        ((1, 2, 2, 8), (1, 4, 2, 8), (1, 2), r"doc_ids \(1, 2\) must be \(B, S\) = \(1, 4\)"),
    ],
)
def test_wrong_shapes_are_refused_with_the_rule(fn, q, k, ids, message: str) -> None:
    doc_ids = None if ids is None else torch.zeros(ids, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        fn(torch.zeros(q), torch.zeros(k), torch.zeros(k), causal=True, doc_ids=doc_ids)
