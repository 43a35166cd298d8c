"""Attention by the flash-attn package (Dao, arXiv:2307.08691), where it is installed: NVIDIA GPUs from Ampere on, fp16 and bf16.

Arguments are translated, nothing is computed here. What the package calls a window counts tokens to the left and to the right; its causal
mask is aligned to the last key, as ours is; the soft cap comes before ALiBi, as ours does. Packed documents become its "variable
length" form, for which the number of documents must be known here: one synchronisation a call.
"""

from __future__ import annotations

import functools
import importlib
import re
from types import ModuleType
from typing import Any

import torch

from dist_llm.kernels.attention.reference import check_arguments

__all__ = ["attention_flash", "attention_flash_lse", "why_not_flash", "why_not_flash_features"]

MIN_VERSION = (2, 7)  # has the soft cap, the deterministic backward, and the log-sum-exp of documents as (N, tokens)
MIN_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256


@functools.cache
def load_flash_attn() -> tuple[ModuleType | None, str]:
    """The package, and why not when it is None. Imported at the first question: it takes seconds."""
    try:
        package = importlib.import_module("flash_attn")
    except ImportError as error:
        return None, f"the package flash-attn cannot be imported: {error}"
    version = str(getattr(package, "__version__", "of unknown version"))
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < MIN_VERSION:
        return None, f"flash-attn is {version}; it takes {'.'.join(map(str, MIN_VERSION))} or later"
    return package, ""


def why_not_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot be used, or None."""
    if device.type != "cuda":
        return f"flash-attn runs on NVIDIA GPUs, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes torch.float16 and torch.bfloat16, not {dtype}"
    package, reason = load_flash_attn()
    if package is None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "flash-attn needs compute capability {}.{}, this GPU has {}.{}".format(*MIN_CAPABILITY, *capability)
    return None


def why_not_flash_features(
    *, head_dim: int, query_doc_ids: torch.Tensor | None = None, alibi_slopes: torch.Tensor | None = None, wants_lse_gradient: bool = False
) -> str | None:
    """Why one call asks for what flash-attn does not have, or None.

    Args:
        head_dim: H.
        query_doc_ids: documents of queries that stand elsewhere in the row than the keys, or None.
        alibi_slopes: of the heads, or None.
        wants_lse_gradient: the log-sum-exp will be differentiated.
    """
    if head_dim > MAX_HEAD_DIM:
        return f"flash-attn takes head dims up to {MAX_HEAD_DIM}, not {head_dim}"
    if query_doc_ids is not None:
        return "flash-attn has no queries that stand elsewhere in the row than the keys (query_doc_ids)"
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        return "flash-attn computes no gradient of the ALiBi slopes; detach them"
    if wants_lse_gradient:
        return "flash-attn has no gradient of the log-sum-exp"
    return None


def attention_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    doc_ids: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """``attention_reference`` by flash-attn; ask ``why_not_flash`` first, as ``select`` does.

    Args: as ``attention_reference``; q, k and v fp16 or bf16.

    Returns:
        (B, T, N, H), dtype of q.

    Raises:
        ValueError: the arguments do not fit one another, or flash-attn lacks what they ask for.
    """
    return attention_flash_lse(
        q, k, v, causal=causal, doc_ids=doc_ids, scale=scale, window=window, alibi_slopes=alibi_slopes, soft_cap=soft_cap
    )[0]


def attention_flash_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    doc_ids: torch.Tensor | None = None,
    query_doc_ids: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``attention_reference_lse`` by flash-attn; ask ``why_not_flash`` first, as ``select`` does.

    Args: as ``attention_reference_lse``; q, k and v fp16 or bf16; ``query_doc_ids`` is refused.

    Returns:
        (B, T, N, H) in the dtype of q, and the log-sum-exp (B, N, T), fp32, without a gradient.

    Raises:
        ValueError: the arguments do not fit one another, or flash-attn lacks what they ask for.
    """
    check_arguments(
        *(q, k, v),
        causal=causal,
        doc_ids=doc_ids,
        query_doc_ids=query_doc_ids,
        window=window,
        alibi_slopes=alibi_slopes,
        soft_cap=soft_cap,
    )
    if reason := why_not_flash_features(head_dim=q.shape[3], query_doc_ids=query_doc_ids, alibi_slopes=alibi_slopes):
        raise ValueError(f"kernels.attention = flash_attn: {reason}")
    package, reason = load_flash_attn()
    if package is None:
        raise ValueError(f"kernels.attention = flash_attn: {reason}")
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": causal,
        # Keys fewer than `window` tokens away: that many less one on each side. -1 is no bound; causal bounds the right side itself.
        "window_size": (-1, -1) if window is None else (window - 1, 0 if causal else window - 1),
        "softcap": 0.0 if soft_cap is None else soft_cap,
        "alibi_slopes": None if alibi_slopes is None else alibi_slopes.to(torch.float32),
        "deterministic": True,
        "return_attn_probs": True,  # with them comes the log-sum-exp; the probabilities themselves are only made for dropout
    }
    if doc_ids is None:
        out, lse, _ = package.flash_attn_func(q, k, v, **options)
        return out, lse.detach()
    batch, num_queries, num_heads, _ = q.shape
    num_keys = k.shape[1]
    key_starts, query_starts = document_starts(doc_ids, num_queries)
    out, lse, _ = package.flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in (q, k, v)),
        cu_seqlens_q=query_starts,
        cu_seqlens_k=key_starts,
        # Bounds that are known without asking the device.
        max_seqlen_q=num_queries,
        max_seqlen_k=num_keys,
        **options,
    )
    return out.view(q.shape), lse.detach().view(num_heads, batch, num_queries).transpose(0, 1)


def document_starts(doc_ids: torch.Tensor, num_queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each document begins among the keys, and among the queries, of all rows one after the other.

    Args:
        doc_ids: (B, S), never falling along a row.
        num_queries: T, the last of the S tokens of each row; a document before them has no queries.

    Returns:
        two int32 tensors of one number a document and the total.
    """
    batch, num_keys = doc_ids.shape
    begins = torch.ones_like(doc_ids, dtype=torch.bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    starts = torch.cat([begins.flatten().nonzero()[:, 0], torch.tensor([batch * num_keys], device=doc_ids.device)])
    # Queries before a place of the flat keys: those of the rows before it, and of its own row what lies behind the first query.
    row, column = starts // num_keys, starts % num_keys
    queries = row * num_queries + (column - (num_keys - num_queries)).clamp(min=0)
    return starts.to(torch.int32), queries.to(torch.int32)
