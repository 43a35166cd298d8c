"""Attention with its log-sum-exp, over a part of the keys, and the gradients of a part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dist_llm.kernels.attention import BLOCK_BACKWARD_IMPLS, BLOCK_IMPLS, IMPLS, LSE_IMPLS
from tests.kernels.case import Case, Sample, results

# B, T, S, N, K, H, and options: "documents" are of that many tokens, "elsewhere" are queries with documents of their own.
Size = tuple[tuple[int, ...], dict[str, Any]]
SIZES: dict[str, Size] = {
    "several blocks": ((1, 200, 200, 3, 3, 64), {"causal": True}),
    "head dim 40, documents": ((2, 123, 123, 4, 2, 40), {"causal": True, "documents": 31}),
    "head dim 1, window": ((1, 65, 65, 2, 2, 1), {"causal": True, "window": 37}),
    "head dim 33, bidirectional": ((1, 70, 70, 2, 1, 33), {"causal": False}),
    "head dim 72, bidirectional window of two": ((1, 131, 131, 2, 1, 72), {"causal": False, "window": 2}),
    "head dim 128, soft cap": ((1, 70, 70, 2, 1, 128), {"causal": True, "soft_cap": 1.5}),
    "head dim 256, alibi": ((1, 67, 67, 2, 1, 256), {"causal": True, "alibi": True}),
    "one token": ((3, 1, 1, 2, 2, 32), {"causal": True}),
    "one token after many, window": ((2, 1, 150, 4, 2, 64), {"causal": True, "window": 90}),
    "two tokens after many": ((1, 2, 150, 4, 2, 48), {"causal": True}),
    "some tokens after many, everything": (
        (1, 19, 300, 2, 2, 64),
        {"causal": False, "documents": 90, "window": 40, "alibi": True, "soft_cap": 2.0, "scale": 0.2},
    ),
    "all heads to one, one-token documents": ((1, 131, 131, 20, 1, 24), {"causal": True, "documents": 1}),
    "bidirectional documents": ((2, 150, 150, 2, 1, 24), {"causal": False, "documents": 70}),
    "window of one": ((1, 67, 67, 2, 2, 16), {"causal": True, "window": 1}),
    "negative scale": ((1, 90, 90, 2, 1, 32), {"causal": True, "scale": -0.3}),
    "queries from elsewhere": ((2, 170, 100, 4, 2, 40), {"causal": False, "elsewhere": 30}),
    "no query": ((2, 0, 5, 2, 2, 8), {"causal": True}),
    "no row": ((0, 5, 5, 2, 2, 8), {"causal": True}),
}
GPU_SIZES: dict[str, Size] = {
    "a layer of a model": ((2, 2048, 2048, 16, 4, 128), {"causal": True}),
    "long, with a window": ((1, 8192, 8192, 8, 8, 64), {"causal": True, "window": 512}),
}
# Attention without its log-sum-exp, which differs by what it returns alone.
PLAIN_SIZES = {name: SIZES[name] for name in ("head dim 40, documents", "some tokens after many, everything", "one token", "no row")}
# Parts of keys are causal or not, with documents, scale and soft cap; windows and slopes are for whole rows.
BLOCK_OPTIONS = ("causal", "documents", "elsewhere", "scale", "soft_cap")


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v, dout."""
    b, t, s, n, k, h = shape
    generator = torch.Generator().manual_seed(11)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h), (b, t, n, h))
    return [torch.randn(each, generator=generator).to(dtype) for each in shapes]


def options_of(shape: tuple[int, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name. Documents are cut differently in each row; every query from elsewhere finds its document."""
    b, t, s, n, _, _ = shape
    made = dict(options)
    shift = 3 * torch.arange(b)[:, None]
    if length := made.pop("documents", None):
        made["doc_ids"] = (torch.arange(s)[None] + shift) // length
    if length := made.pop("elsewhere", None):
        made["doc_ids"] = ((torch.arange(s)[None] + shift) // length).int()
        made["query_doc_ids"] = ((torch.arange(t)[None] * s // t + shift) // length).int()
    if made.pop("alibi", False):
        made["alibi_slopes"] = 0.5 ** torch.arange(1, n + 1)
    return made


def with_scales(sample: Sample, reference: Callable[..., Any], dtype: torch.dtype, names: str, *, first: int = 0) -> Sample:
    """Terms of the results: of the largest number of a result, where dq and dk share that of dv too, and of a log-sum-exp at least 1.

    What follows from two fp32 roundings of the terms of a score, which change a probability by that factor, is no error, and neither is
    one rounding of a probability to the dtype of the values. dq and dk are sums of differences, which vanish where a query sees one key.

    Args:
        sample: arguments with q and k at ``first`` and behind it.
        reference: the definition.
        dtype: of the values.
        names: of the results, in their order.
        first: position of q.
    """
    q, k = (t.double().abs() for t in sample.args[first : first + 2])
    if q.numel() * k.numel() == 0:
        return sample
    products = torch.einsum("btnh,bsnh->bnts", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))
    scale = abs(sample.kwargs.get("scale") or q.shape[3] ** -0.5)
    score_error = 2 * torch.finfo(torch.float32).eps * products.max().item() * scale
    exact = results(reference, sample.double())
    terms = {name: t.abs().max().item() for name, t in zip(names.split(), exact, strict=True)}
    if "dq" in terms:
        terms["dq"] = terms["dk"] = max(terms["dq"], terms["dk"], terms["dv"])
    if "lse" in terms:
        terms["lse"] = max(terms["lse"], 1.0)
    allowed = {name: size * (score_error + torch.finfo(torch.float32 if name == "lse" else dtype).eps) for name, size in terms.items()}
    # The suite counts four spacings of fp32.
    return replace(sample, scales={n: size / (4 * torch.finfo(torch.float32).eps) for n, size in enumerate(allowed.values())})


def make(size: Size, dtype: torch.dtype) -> Sample:
    shape, options = size
    sample = Sample(tuple(tensors(shape, dtype)[:3]), options_of(shape, options), wanted=(0, 1, 2))
    return with_scales(sample, LSE_IMPLS[-1].fn, dtype, "out lse dq dk dv")


def make_plain(size: Size, dtype: torch.dtype) -> Sample:
    shape, options = size
    sample = Sample(tuple(tensors(shape, dtype)[:3]), options_of(shape, options), wanted=(0, 1, 2))
    return with_scales(sample, IMPLS[-1].fn, dtype, "out dq dk dv")


def make_block(size: Size, dtype: torch.dtype) -> Sample:
    shape, options = size
    kept = {name: value for name, value in options.items() if name in BLOCK_OPTIONS}
    return with_scales(Sample(tuple(tensors(shape, dtype)[:3]), options_of(shape, kept)), BLOCK_IMPLS[-1].fn, dtype, "out lse")


def make_block_backward(size: Size, dtype: torch.dtype) -> Sample:
    """The second half of the keys, with the result and the log-sum-exp of all."""
    shape, options = size
    q, k, v, dout = tensors(shape, dtype)
    made = options_of(shape, {name: value for name, value in options.items() if name in BLOCK_OPTIONS})
    out, lse = BLOCK_IMPLS[-1].fn(q, k, v, **made)
    half = max(shape[2] - shape[1], 0) if made["causal"] or "query_doc_ids" not in made else shape[2] // 2
    if "doc_ids" in made:
        made["doc_ids"] = made["doc_ids"][:, half:]
    sample = Sample((dout, q, k[:, half:], v[:, half:], out.to(dtype), lse), made)
    return with_scales(sample, BLOCK_BACKWARD_IMPLS[-1].fn, dtype, "dq dk dv", first=1)


def checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    shape = (2, 11, 17, 4, 2, 24)
    q, k, v, dout = tensors(shape, dtype)
    dlse = torch.ones(2, 4, 11)
    everything = {"causal": False, "documents": 9, "window": 4, "alibi": True, "soft_cap": 2.0}
    asked: list[tuple[dict[str, Any], bool, torch.Tensor | None]] = [
        ({"causal": True}, False, None),
        ({"causal": True}, True, None),
        (everything, True, dlse),
        ({"causal": False, "elsewhere": 5}, False, dlse),
    ]
    found: list[tuple[Any, tuple[Any, ...]]] = []
    for options, fp32_out, given_dlse in asked:
        made = options_of(shape, options)
        numbers = (made["causal"], made.get("window", 0), 0.2, made.get("soft_cap", 0.0))
        given = (made.get("doc_ids"), made.get("query_doc_ids"), made.get("alibi_slopes"), *numbers, fp32_out)
        out, lse = torch.ops.dist_llm.attention(q, k, v, *given)
        found.append((torch.ops.dist_llm.attention, (*(t.clone().requires_grad_() for t in (q, k, v)), *given)))
        found.append((torch.ops.dist_llm.attention_backward, (dout, given_dlse, q, k, v, out.to(dtype), lse, *given)))
    return found


def no_checks(dtype: torch.dtype) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    """The ops are those of the first case."""
    del dtype
    return []


# Torch's own attention is held to a bound of its own in test_attention_op.py: it rounds probabilities in every step.
CASES = [
    Case("attention_lse", LSE_IMPLS, SIZES, make, checks, gpu_sizes=GPU_SIZES),
    Case("attention", tuple(i for i in IMPLS if i.name != "sdpa"), PLAIN_SIZES, make_plain, no_checks, gpu_sizes=GPU_SIZES),
    Case("attention_block", tuple(i for i in BLOCK_IMPLS if i.name != "sdpa"), SIZES, make_block, no_checks),
    Case("attention_block_backward", tuple(i for i in BLOCK_BACKWARD_IMPLS if i.name != "sdpa"), SIZES, make_block_backward, no_checks),
]
