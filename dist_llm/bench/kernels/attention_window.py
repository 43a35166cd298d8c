"""``bench attention_window``: a sliding window, packed documents, and GPT-3's banded layers, against torch's attention with a mask tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from dist_llm.bench.kernels.attention import attention_flops, qkv
from dist_llm.bench.kernels.case import Race, raced
from dist_llm.kernels.attention import IMPLS

__all__ = ["races"]

NUM_DOCUMENTS = 16
FLEX = "flex_attention, torch's own way to such masks, has no backward on CPU and has not been raced on a GPU yet"


def with_mask(mask: torch.Tensor) -> Callable[..., torch.Tensor]:
    """torch's fused attention with a mask; the mask itself is made beforehand, which favours it."""

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return eager


def races(device: torch.device, *, tiny: bool = False) -> list[Race]:
    """bf16, forward and backward; the first is the standard shape."""
    ours, reference = raced(IMPLS, device, torch.bfloat16).fn, IMPLS[-1].fn
    shape = (1, 64, 2, 64) if tiny else (1, 2048, 12, 64) if device.type == "cpu" else (4, 8192, 16, 128)
    window, tokens = 16 if tiny else 128, shape[1]
    near = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    doc_ids = (torch.arange(tokens, device=device) * NUM_DOCUMENTS // tokens).expand(shape[0], -1).contiguous()
    forms: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
        f"sliding window of {window}": ({"window": window}, near & ~near.tril(-window)),
        f"{NUM_DOCUMENTS} packed documents": ({"doc_ids": doc_ids}, near & (doc_ids[0][:, None] == doc_ids[0][None, :])),
    }
    return [
        Race(
            title="{} attention bf16 B {} S {} H {} D {}".format(what, *shape),
            args=qkv(shape, device),
            wanted=(0, 1, 2),
            reference=partial(reference, causal=True, **options),
            ours=partial(ours, causal=True, **options),
            eager=with_mask(mask),
            flops=attention_flops(shape, int(mask.sum())),
            goal=10.0,
            notes=f"torch's mask is made before the clock starts; {FLEX}",
        )
        for what, (options, mask) in forms.items()
    ]
