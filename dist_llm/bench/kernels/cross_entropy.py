"""``bench cross_entropy``."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from dist_llm.bench.kernels.case import Race, raced
from dist_llm.kernels.cross_entropy import IMPLS

__all__ = ["eager", "races"]

IGNORE = -100


def eager(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """torch's own, in fp32 as one trains with it."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")


def races(device: torch.device, *, tiny: bool = False) -> list[Race]:
    """Forward and backward; the first is the standard shape."""
    made = []
    bf16, fp32 = torch.bfloat16, torch.float32
    on_cpu = [(512, 50304, bf16), (4096, 1024, bf16), (3072, 65, bf16), (512, 50304, fp32)]
    on_gpu = [(8192, 50304, bf16), (8192, 128256, bf16)]
    for rows, vocab, dtype in [(7, 33, bf16), (7, 33, fp32)] if tiny else on_cpu if device.type == "cpu" else on_gpu:
        logits = (3 * torch.randn(rows, vocab, device=device)).to(dtype)
        made.append(
            Race(
                title=f"cross-entropy {str(dtype).removeprefix('torch.')} {rows} x {vocab}",
                args=(logits, torch.randint(0, vocab, (rows,), device=device)),
                wanted=(0,),
                reference=partial(IMPLS[-1].fn, ignore=IGNORE),
                ours=partial(raced(IMPLS, device, dtype).fn, ignore=IGNORE),
                eager=eager,
                # Forward reads the logits; backward reads them again and writes their gradient.
                moved_bytes=3 * logits.nbytes,
                goal=6.0 if device.type == "cpu" and (rows, vocab, dtype) == on_cpu[0] else None,
            )
        )
    return made
