"""flash-attn and apex: what can be tested where neither can be installed.

The stubs below have the vendors' documented signatures and compute what their documentation says, by themselves and not with our references:
they show that arguments are translated, not that the vendors' kernels are right.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch

from dist_llm.kernels.apex import load_apex
from dist_llm.kernels.attention import flash_attn
from dist_llm.kernels.attention.reference import attention_reference_lse
from dist_llm.kernels.layer_norm import apex as layer_apex
from dist_llm.kernels.layer_norm.reference import layer_norm_reference, layer_norm_residual_reference
from dist_llm.kernels.rms_norm import apex as rms_apex
from dist_llm.kernels.rms_norm.reference import rms_norm_reference, rms_norm_residual_reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
Calls = list[tuple[str, dict[str, Any]]]
Provide = Callable[[Mapping[str, ModuleType | None]], None]


def stub_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, (T, N, H) and (S, K, H): flash-attn's documentation as a formula. Returns (T, N, H) and (N, T)."""
    (num_queries, num_heads, head_dim), num_keys = q.shape, k.shape[0]
    k, v = (t.repeat_interleave(num_heads // t.shape[1], 1) for t in (k, v))
    scale = head_dim**-0.5 if options["softmax_scale"] is None else options["softmax_scale"]
    scores = torch.einsum("tnh,snh->nts", q, k) * scale
    if options["softcap"] > 0:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    distance = torch.arange(num_queries)[:, None] + num_keys - num_queries - torch.arange(num_keys)[None, :]
    if options["alibi_slopes"] is not None:
        scores = scores - options["alibi_slopes"][:, None, None] * distance.abs()
    left, right = options["window_size"]
    right = 0 if options["causal"] else right
    hidden = ((distance > left) & (left >= 0)) | ((-distance > right) & (right >= 0))
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("nts,snh->tnh", scores.softmax(-1), v), scores.logsumexp(-1)


def stub_flash_attn(calls: Calls, version: str = "2.8.3") -> ModuleType:
    """A stub of the vendor's package, which is not installable here."""

    def flash_attn_func(
        q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1),
        softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        options = dict(locals())
        calls.append(("flash_attn_func", options))
        rows = [stub_attention(*row, options) for row in zip(q, k, v, strict=True)]
        out, lse = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
        return (out, lse, None) if return_attn_probs else out

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
        softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
    ) -> Any:  # fmt: skip
        options = dict(locals())
        calls.append(("flash_attn_varlen_func", options))
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and cu_seqlens_q.shape == cu_seqlens_k.shape
        q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert max_seqlen_q >= max(b - a for a, b in itertools.pairwise(q_ends))
        parts = [
            stub_attention(q[q_ends[i] : q_ends[i + 1]], k[k_ends[i] : k_ends[i + 1]], v[k_ends[i] : k_ends[i + 1]], options)
            for i in range(len(q_ends) - 1)
        ]
        out, lse = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], 1)
        return (out, lse, None) if return_attn_probs else out

    module = ModuleType("flash_attn")
    module.__dict__.update(__version__=version, flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    return module


def stub_apex(calls: Calls) -> ModuleType:
    """A stub of ``apex.normalization.fused_layer_norm``, which is not installable here."""

    def normal(x: torch.Tensor, shape: Any, eps: float, subtracts_mean: bool) -> torch.Tensor:
        dims = tuple(range(-len(shape), 0))
        x = x.float()
        x = x - x.mean(dims, keepdim=True) if subtracts_mean else x
        return x / (x.square().mean(dims, keepdim=True) + eps).sqrt()

    def make(name: str, has_bias: bool, is_mixed: bool) -> Callable[..., torch.Tensor]:
        def norm(x: torch.Tensor, weight: torch.Tensor, bias: Any, shape: Any, eps: float) -> torch.Tensor:
            calls.append((name, {"shape": tuple(shape), "eps": eps}))
            assert is_mixed or weight.dtype == x.dtype, "apex's plain functions take one dtype"
            y = normal(x, shape, eps, has_bias) * weight.float()
            return (y if bias is None else y + bias.float()).to(weight.dtype if is_mixed else x.dtype)

        def with_bias(
            input: Any, weight: Any, bias: Any, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
        ) -> torch.Tensor:
            del memory_efficient
            return norm(input, weight, bias, normalized_shape, eps)

        def without_bias(input: Any, weight: Any, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False) -> torch.Tensor:
            del memory_efficient
            return norm(input, weight, None, normalized_shape, eps)

        return with_bias if has_bias else without_bias

    module = ModuleType("apex.normalization.fused_layer_norm")
    for prefix, is_mixed in (("", False), ("mixed_dtype_", True)):
        for name, has_bias in ((f"{prefix}fused_layer_norm_affine", True), (f"{prefix}fused_rms_norm_affine", False)):
            setattr(module, name, make(name, has_bias, is_mixed))
    return module


@pytest.fixture
def vendors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Provide]:
    """Makes some modules importable, and all other vendor modules not, for one test."""

    def provide(modules: Mapping[str, ModuleType | None]) -> None:
        for name in ("flash_attn", "fused_layer_norm_cuda", "apex.normalization.fused_layer_norm"):
            monkeypatch.setitem(sys.modules, name, modules.get(name))  # None: an import of it fails
        for load in loaders:
            load.cache_clear()

    loaders: tuple[Any, ...] = (flash_attn.load_flash_attn, load_apex)
    yield provide
    monkeypatch.undo()
    for load in loaders:
        load.cache_clear()


def qkv(num_queries: int, num_keys: int, heads: int = 4, kv_heads: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, num_queries, heads, 8), (2, num_keys, kv_heads, 8), (2, num_keys, kv_heads, 8))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


DOC_IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 6, 6, 6, 6, 6, 6, 6, 6]])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
FEATURES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "bidirectional": {"causal": False},
    "scale": {"causal": True, "scale": 0.3},
    "window": {"causal": True, "window": 3},
    "window on both sides": {"causal": False, "window": 3},
    "window of the token itself": {"causal": True, "window": 1},
    "alibi": {"causal": True, "alibi_slopes": SLOPES},
    "soft cap before alibi": {"causal": True, "alibi_slopes": SLOPES, "soft_cap": 0.7},
    "documents": {"causal": True, "doc_ids": DOC_IDS},
    "documents, all together": {"causal": True, "doc_ids": DOC_IDS, "window": 2, "alibi_slopes": SLOPES, "soft_cap": 2.0, "scale": 0.5},
    "documents, bidirectional": {"causal": False, "doc_ids": DOC_IDS, "window": 2},
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("num_queries", [9, 4, 1])
def test_flash_attn_is_asked_for_what_the_reference_computes(name: str, num_queries: int, vendors: Provide) -> None:
    calls: Calls = []
    vendors({"flash_attn": stub_flash_attn(calls)})
    q, k, v = qkv(num_queries, 9)
    out, lse = flash_attn.attention_flash_lse(q, k, v, **FEATURES[name])
    exact, exact_lse = attention_reference_lse(q, k, v, **FEATURES[name])
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-6)
    assert torch.equal(flash_attn.attention_flash(q, k, v, **FEATURES[name]), out)
    function, options = calls[0]
    assert function == ("flash_attn_varlen_func" if "doc_ids" in FEATURES[name] else "flash_attn_func")
    assert options["deterministic"] and options["dropout_p"] == 0.0


def test_documents_without_queries_have_none_in_the_lengths() -> None:
    keys, queries = flash_attn.document_starts(DOC_IDS, 3)
    assert keys.tolist() == [0, 3, 5, 9, 10, 18]
    assert queries.tolist() == [0, 0, 0, 3, 3, 6]


def test_gradients_flow_through_the_output_and_not_through_the_log_sum_exp(vendors: Provide) -> None:
    vendors({"flash_attn": stub_flash_attn([])})
    q, k, v = (t.requires_grad_() for t in qkv(9, 9))
    out, lse = flash_attn.attention_flash_lse(q, k, v, causal=True)
    assert out.requires_grad and not lse.requires_grad
    torch.autograd.grad(out.sum(), (q, k, v))


def test_what_flash_attn_lacks_is_refused_by_name(vendors: Provide) -> None:
    vendors({"flash_attn": stub_flash_attn([])})
    q, k, v = qkv(9, 9)
    wide = torch.zeros(1, 2, 1, 264)
    with pytest.raises(ValueError, match="head dims up to 256, not 264"):
        flash_attn.attention_flash(wide, wide, wide, causal=True)
    with pytest.raises(ValueError, match="no gradient of the ALiBi slopes"):
        flash_attn.attention_flash(q, k, v, causal=True, alibi_slopes=SLOPES.clone().requires_grad_())
    with pytest.raises(ValueError, match="query_doc_ids"):
        flash_attn.attention_flash_lse(q, k, v, causal=False, doc_ids=DOC_IDS, query_doc_ids=DOC_IDS)
    assert flash_attn.why_not_flash_features(head_dim=64) is None
    assert "log-sum-exp" in str(flash_attn.why_not_flash_features(head_dim=64, wants_lse_gradient=True))


def test_why_not_flash_names_the_device_the_dtype_the_package_the_version_and_the_gpu(
    vendors: Provide, monkeypatch: pytest.MonkeyPatch
) -> None:
    vendors({})
    assert flash_attn.why_not_flash(CPU, torch.bfloat16) == "flash-attn runs on NVIDIA GPUs, not on cpu"
    assert "not torch.float32" in str(flash_attn.why_not_flash(CUDA, torch.float32))
    assert "cannot be imported: import of flash_attn halted" in str(flash_attn.why_not_flash(CUDA, torch.bfloat16))
    with pytest.raises(ValueError, match="flash_attn: the package flash-attn cannot be imported"):
        flash_attn.attention_flash(*qkv(9, 9), causal=True)
    vendors({"flash_attn": stub_flash_attn([], "2.6.3")})
    assert flash_attn.why_not_flash(CUDA, torch.bfloat16) == "flash-attn is 2.6.3; it takes 2.7 or later"
    vendors({"flash_attn": stub_flash_attn([], "2.10.0.post1")})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert flash_attn.why_not_flash(CUDA, torch.bfloat16) == "flash-attn needs compute capability 8.0, this GPU has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert flash_attn.why_not_flash(CUDA, torch.float16) is None


def norm_inputs(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    x, residual = (torch.randn(2, 3, 17, generator=generator).to(x_dtype) for _ in range(2))
    weight, bias = (torch.randn(17, generator=generator).to(weight_dtype) for _ in range(2))
    return x, residual, weight, bias


DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
EPS = 1e-5


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_apex_is_asked_for_what_the_references_compute(dtypes: tuple[torch.dtype, torch.dtype], vendors: Provide) -> None:
    calls: Calls = []
    vendors({"fused_layer_norm_cuda": ModuleType("fused_layer_norm_cuda"), "apex.normalization.fused_layer_norm": stub_apex(calls)})
    x, residual, weight, bias = norm_inputs(*dtypes)
    pairs = [
        (rms_apex.rms_norm_apex(x, weight, EPS), rms_norm_reference(x, weight, EPS)),
        (layer_apex.layer_norm_apex(x, weight, bias, EPS), layer_norm_reference(x, weight, bias, EPS)),
        (layer_apex.layer_norm_apex(x, weight, None, EPS), layer_norm_reference(x, weight, None, EPS)),
        *zip(rms_apex.rms_norm_residual_apex(x, residual, weight, EPS), rms_norm_residual_reference(x, residual, weight, EPS), strict=True),
        *zip(
            layer_apex.layer_norm_residual_apex(x, residual, weight, bias, EPS),
            layer_norm_residual_reference(x, residual, weight, bias, EPS),
            strict=True,
        ),
    ]
    for ours, exact in pairs:
        assert ours.dtype == x.dtype
        torch.testing.assert_close(ours, exact, rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    prefix = "mixed_dtype_" if dtypes[0] != dtypes[1] else ""
    assert [name for name, _ in calls[:2]] == [f"{prefix}fused_rms_norm_affine", f"{prefix}fused_layer_norm_affine"]
    assert all(options == {"shape": (17,), "eps": EPS} for _, options in calls)


@pytest.mark.parametrize("adapter", [rms_apex, layer_apex], ids=["rms_norm", "layer_norm"])
def test_why_not_apex_names_the_device_the_dtype_the_package_and_its_extension(adapter: Any, vendors: Provide) -> None:
    vendors({})
    assert adapter.why_not_apex(CPU, torch.bfloat16) == "apex runs on NVIDIA GPUs, not on cpu"
    assert "not torch.float64" in adapter.why_not_apex(CUDA, torch.float64)
    assert "import of fused_layer_norm_cuda halted" in adapter.why_not_apex(CUDA, torch.bfloat16)
    vendors({"fused_layer_norm_cuda": ModuleType("fused_layer_norm_cuda"), "apex.normalization.fused_layer_norm": ModuleType("empty")})
    assert "this apex is too old: it has no fused_" in adapter.why_not_apex(CUDA, torch.bfloat16)
    vendors({"fused_layer_norm_cuda": ModuleType("fused_layer_norm_cuda"), "apex.normalization.fused_layer_norm": stub_apex([])})
    assert adapter.why_not_apex(CUDA, torch.bfloat16) is None


def test_norms_by_apex_raise_where_it_is_not_installed(vendors: Provide) -> None:
    vendors({})
    x, _, weight, bias = norm_inputs(torch.float32, torch.float32)
    with pytest.raises(ValueError, match="rms_norm = apex: apex with its fused_layer_norm_cuda"):
        rms_apex.rms_norm_apex(x, weight, EPS)
    with pytest.raises(ValueError, match="layer_norm = apex: apex with its fused_layer_norm_cuda"):
        layer_apex.layer_norm_apex(x, weight, bias, EPS)


def test_the_adapter_of_flash_attn_has_the_arguments_of_its_reference() -> None:
    ours, reference = (set(inspect.signature(fn).parameters) for fn in (flash_attn.attention_flash_lse, attention_reference_lse))
    assert ours == reference
