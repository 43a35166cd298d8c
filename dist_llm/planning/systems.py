"""What published training systems do, as their papers, code and notes say: the ``Software`` of a row of published runs.

What a system has (fused attention, sequence parallelism, overlap, recomputation) is a fact about its code at the time, with the
source beside it. How much that costs is one figure for a kind of software, not for a run; the figures for which no benchmark is
published come from looking at these runs and are marked INFERRED. docs/planning/predict.md shows what each is worth. A system that
is not listed is taken as a present-day one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dist_llm.planning.software import Recompute, Software

__all__ = ["System", "system_of"]

# Fused CUDA kernels for softmax, bias and GELU, bias and dropout; no fused attention; gradients summed after the backward
# (Megatron-LM, arXiv:2104.04473, section 4.2; Megatron-DeepSpeed has the same layers). INFERRED: passes and loss_bytes, the memory
# traffic over that of one kernel a chain: 1.3 where most chains are fused, 1.6 to 2 in eager PyTorch.
_CLASSIC = Software(attention="plain", dropout=True, passes=1.3, dp_overlap=0.0, pp_overlap=0.0, loss_bytes=20.0, accumulate_bytes=10.0)
# Megatron-DeepSpeed loses a fixed time a layer and micro-batch beyond its work: BLOOM's sweep of micro-batch sizes at one layout shows
# 6 ms at tp 8 and tp 4 alike (143, 134, 124 s a step at 1, 2, 4 rows). INFERRED.
_DEEPSPEED_LAYER_S = 0.006
# Megatron-Core with Transformer Engine: cuDNN attention, fused norms, overlapped gradient and parameter traffic, partly overlapped
# tensor-parallel traffic (Megatron-LM README: --overlap-grad-reduce, --overlap-param-gather, --tp-comm-overlap). INFERRED: half of the tensor-parallel traffic is hidden.
_MEGATRON = Software(tp_overlap=0.5, grad_bytes=2)
# torch.compile fuses element-wise chains; attention is PyTorch's FlashAttention-2, which does not use Hopper's wgmma: 350 of the
# 600 TFLOP/s of version 3 (arXiv:2407.08608, figure 5).
_FLASH2 = Software(attention_speed=0.58)
# Before FlashAttention-3 (July 2024) Hopper's attention was cuDNN 8.9 or FlashAttention-2: 350 to 500 TFLOP/s (the same figure).
_CUDNN8 = 0.75
_TITAN_SELECTIVE = Recompute(gemm=0.5, elementwise=1.0)  # every second matrix product is kept (torchtitan, parallelize_llama.py)


@dataclass(frozen=True)
class System:
    """A training system and the defaults that a row leaves unsaid."""

    software: Software
    sequence_parallel: bool = True
    zero: int = 1
    counts_recompute: bool = False  # its printed FLOPs include the recomputed forward


def system_of(name: str, *, hopper: bool, year: int | None, note: str, recompute: str) -> System:
    """The system ``name`` (column ``system``) as it was.

    Args:
        hopper: the device is an H100 or later (fused attention of version 2 is slow there).
        year: of the source, from its arXiv number, where it has one.
        note: column ``note``; says whether a run was compiled.
        recompute: column ``recompute``: Megatron introduced sequence parallelism and selective recomputation together.
    """
    key = name.lower()
    flash2 = _FLASH2 if hopper else Software()
    if "megatron-deepspeed" in key or "neox" in key or "deepspeed zero" in key:
        overlap = 1.0 if "zero" in key else 0.0  # ZeRO-3 prefetches parameters
        return System(
            replace(_CLASSIC, dp_overlap=overlap, accumulate_bytes=6.0, layer_overhead_s=_DEEPSPEED_LAYER_S),
            sequence_parallel=False,
            zero=3 if "zero-3" in key else 1,
            counts_recompute=True,
        )
    if key.startswith("megatron-lm") and not hopper and (year is None or year <= 2022):
        # Version 3 (2022) adds gradients inside the product that makes them.
        accumulate = 0.0 if year == 2022 else _CLASSIC.accumulate_bytes
        return System(
            replace(_CLASSIC, accumulate_bytes=accumulate), sequence_parallel=recompute == "selective", zero=0, counts_recompute=True
        )
    if "llm-foundry" in key:
        # Triton FlashAttention (version 1, with ALiBi; INFERRED: its speed on an H100), eager PyTorch, FSDP with fp32 gradients unless all is bf16.
        speed = 0.40 if hopper else 0.62
        return System(
            Software(attention_speed=speed, passes=1.6, loss_bytes=24.0, accumulate_bytes=10.0, grad_bytes=2 if "PURE" in note else 4),
            zero=3,
        )
    if "torchtitan" in key or "kempner" in key or "fms" in key:
        eager = bool(re.search(r"no torch\.compile|eager|compile=no\b|compile=false", note))
        # INFERRED: what asynchronous tensor parallelism hides.
        overlap = 0.4 if re.search(r"async ?tp", note, re.IGNORECASE) else 0.0
        software = replace(
            flash2,
            passes=2.0 if eager else 1.0,
            selective=_TITAN_SELECTIVE,
            tp_overlap=overlap,
            loss_bytes=24.0 if eager else 12.0,
            gathers_every_micro="torchtitan" not in key,
            # One scale a row needs slower kernels than one a tensor (torchao, float8 README). INFERRED: by how much.
            fp8_speed=0.7 if "rowwise" in note else 1.0,
            accumulate_bytes=10.0,
        )
        return System(software, zero=3)
    if "nanotron" in key:
        return System(replace(flash2, passes=2.0, loss_bytes=24.0, dp_overlap=0.0, pp_overlap=0.0))
    if "pax" in key:
        selective = Recompute(attention=1.0, elementwise=1.0)  # SAVE_DOT_WITH_NO_BATCH_DIM keeps products with weights
        return System(Software(attention="plain", selective=selective), zero=3)
    if "llama3" in key or "llama 3" in key:
        # Keys and values are gathered before attention, not behind it (arXiv:2407.21783, section 3.3.2).
        return System(replace(_MEGATRON, cp_overlap=0.0, grad_bytes=4, tp_overlap=0.0, attention_speed=_CUDNN8))
    if "maxtext" in key:
        return System(Software(selective=Recompute(elementwise=1.0)), zero=3)  # minimal_flash keeps products and attention
    if "tinyllama" in key:
        return System(Software(), zero=3)
    if "llm.c" in key:
        return System(Software())
    if "nemo" in key and not hopper:
        return System(replace(_CLASSIC, dp_overlap=1.0), sequence_parallel=False)  # 2022: overlapped distributed Adam
    if key == "nemo":  # containers 24.03 and 24.07
        return System(replace(_MEGATRON, attention_speed=_CUDNN8))
    if "bridge" in key:
        # DeepEP and HybridEP dispatch (Megatron-Bridge performance guide); INFERRED: the exchange is hidden
        # from container 26.06 on, when equal layouts became up to 1.4 times faster.
        container = re.search(r"(\d\d)\.(\d\d)", note)
        recent = container is not None and (int(container[1]), int(container[2])) >= (26, 6)
        return System(replace(_MEGATRON, once_a_node=True, ep_overlap=1.0 if recent else 0.0))
    return System(_MEGATRON)
