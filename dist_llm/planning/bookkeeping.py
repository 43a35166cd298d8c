"""How many bytes a parameter costs in a training system, ours or a published one, and what its layers save for the backward.

Published runs fit into memory with the bookkeeping of the system they ran on, which is often lighter than ours (bf16 gradients,
parameters kept once, products saved in 8 bits). Facts about systems come from their papers and code; what is inferred says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from dist_llm.planning.saving import Saving

__all__ = ["OURS", "Bookkeeping", "published_bookkeeping"]


@dataclass(frozen=True)
class Bookkeeping:
    """Bytes a parameter, where it is not the trainer's own engine that keeps them, and what comes on top of tensors.

    own: the bytes are those of ``planning.state_bytes``; the next six then mean nothing. weight: of what the layers read.
    gradient: of their sum. master: of the copy that the optimiser steps; 0 where the weights are stepped themselves. moments:
    both. gathered_layers: blocks whose whole weights ZeRO-3 holds at once. divides_experts: experts are divided over tp, too.
    even_stages: as many layers on every pipeline stage. keeps_outputs: a stage keeps what it sent until the gradient comes. saving: what the layers save. context: bytes of the device's context and
    libraries. unused: share of the tensors' bytes that the allocator holds besides.
    """

    own: bool = False
    weight: float = 2.0
    gradient: float = 4.0
    master: float = 4.0
    moments: float = 8.0
    gathered_layers: int = 2
    divides_experts: bool = False
    even_stages: bool = True
    keeps_outputs: bool = True
    saving: Saving = field(default_factory=Saving)
    context: int = 2**30
    unused: float = 0.04


OURS = Bookkeeping(own=True, even_stages=False)

# Transformer Engine and Megatron-LM: gate and product in one kernel.
_FUSED = Saving(gathers_again=True, gated_tensors=3)
_UNFUSED = Saving(attention="scores", gathers_again=True, dropout=True)  # before 2023: scores are written, and dropped
_COMPILED = Saving(gathers_again=True, gated_tensors=2)  # torch.compile saves results of products and makes the rest again


def published_bookkeeping(
    system: str, *, precision: str = "bf16", gradient: float = 4.0, note: str = "", fused: bool = True
) -> Bookkeeping:
    """The bookkeeping of a published training system.

    Args:
        system: its name (column ``system`` of published runs).
        precision: of its matrix products.
        gradient: bytes of a gradient in its reduction, in which it also adds them up.
        note: what the table says besides.
        fused: it has fused attention.

    A data sheet's 80 GB are 80 GiB less a reserve: the 5 GB between pay for the context, which is therefore 0 here.
    """
    key = system.lower()
    eight_bits = 1 if precision in ("fp8", "fp4") else None
    if any(name in key for name in ("foundry", "titan", "kempner", "fms", "pax", "maxtext", "tinyllama", "zero-3")):
        return _fully_sharded(key, note, eight_bits, fused)
    if "llm.c" in key:  # its own kernels: bf16 weights and gradients, fp32 masters and moments (llm.c, train_gpt2.cu)
        return Bookkeeping(gradient=2, saving=Saving(), context=0)
    if precision == "fp16":
        gradient = 2  # fp16 gradients are added up as such (Megatron-LM: fp32 sums come with bf16)
    saving = replace(_FUSED if fused else _UNFUSED, input_size=eight_bits)
    if "nanotron" in key:
        saving = replace(saving, gathers_again=False)
    # A stage frees what it has sent (Megatron-LM, pipeline_parallel/schedules.py, deallocate_output_tensor; arXiv:2407.21783, 3.3.2).
    return Bookkeeping(gradient=gradient, saving=saving, divides_experts="ETP=blank" in note, keeps_outputs=False, context=0)


def _fully_sharded(key: str, note: str, eight_bits: int | None, fused: bool) -> Bookkeeping:
    # FSDP divides fp32 parameters, which the optimiser steps themselves, and gathers them in bf16 block by block
    # (Zhao et al., arXiv:2304.11277, section 4): 16 bytes a parameter.
    compiled = re.search(r"no torch\.compile|eager|compile=no\b|compile=false", note) is None and "foundry" not in key
    saving = _COMPILED if compiled else Saving(gathers_again=True, gated_tensors=4)
    if not fused:
        saving = replace(saving, attention="scores")
    if "titan" in key:
        saving = replace(saving, selective="half")  # every second product is kept (torchtitan, parallelize_llama.py)
    elif any(name in key for name in ("pax", "maxtext", "kempner")):
        saving = replace(saving, selective="products")  # SAVE_DOT_WITH_NO_BATCH_DIM, minimal_flash
    return Bookkeeping(weight=4, master=0, saving=replace(saving, input_size=eight_bits), context=0)
