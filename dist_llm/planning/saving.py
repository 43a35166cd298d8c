"""What layers save for the backward pass, where implementations and training systems differ in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from dist_llm.config.schema import RunConfig
from dist_llm.planning.implementations import Device, implementation_of
from dist_llm.planning.shapes import ModelShape

__all__ = ["AUTO", "OURS", "Attention", "Kernels", "Saving", "saving_of"]

Attention = Literal["fused", "one_mask", "row_masks", "math", "scores"]
PlainOp = Literal["norm", "activation", "cross_entropy", "attention_block"]


@dataclass(frozen=True)
class Saving:
    """What a training system's layers save; ``OURS`` are the trainer's own layers with compiled kernels.

    attention: ``fused`` never writes the T x T scores; ``one_mask`` and ``row_masks`` neither, but keep a mask of T x T, one or one a row of the
        batch, in the compute dtype. ``math``: fp32 copies and probabilities in full, by torch's fallback or the trainer's definition.
        ``scores``: scores and probabilities in the compute dtype, and a mask.
    windowed: the same of layers with a window; default ``attention``.
    plain: ops computed by plain PyTorch, which makes fp32 copies, instead of a kernel of their own; ``attention_block`` is the ring's.
    gathers_again: under sequence parallelism only the divided tensor is saved and the backward gathers it again (Megatron-LM).
    gated_tensors: tensors as wide as the MLP that a gated one saves: 4; 3 where gate and product are one kernel; 2 where the
        product is computed again.
    input_size: bytes of an element that a matrix product saves of its input, where it is not the compute dtype's (8-bit formats).
    selective: what recomputation called selective keeps besides the input of a block. ``attention``: all but what lies between
        the projections (Korthikanti et al., arXiv:2205.05198, section 5). ``products``: the results of attention and of matrix
        products. ``half``: of attention and of every second product.
    casts_weights: each product saves a copy of its weight in the compute dtype (the module's parameters are fp32).
    dropout: one byte an element for the masks of the two sub-layers' results.
    """

    attention: Attention = "fused"
    windowed: Attention | None = None
    plain: frozenset[PlainOp] = frozenset()
    gathers_again: bool = False
    gated_tensors: int = 4
    input_size: int | None = None
    selective: Literal["attention", "products", "half"] = "attention"
    casts_weights: bool = False
    dropout: bool = False


OURS = Saving(gated_tensors=3)


@dataclass(frozen=True)
class Kernels:
    """What a config asks for of the ops that save something for the backward, and whether attention stays inside documents."""

    norm: str = "auto"
    activation: str = "auto"
    attention: str = "auto"
    cross_entropy: str = "auto"
    documents: bool = False

    @classmethod
    def of(cls, config: RunConfig) -> Kernels:
        """Those of ``config``."""
        kernels = config.kernels
        norm = kernels.rms_norm if config.model.norm == "rms_norm" else kernels.layer_norm
        return cls(norm, kernels.activation, kernels.attention, kernels.cross_entropy, config.data.document_mask)


AUTO = Kernels()


@lru_cache(maxsize=1024)
def saving_of(kernels: Kernels, model: ModelShape, device: Device, precision: str) -> Saving:
    """What the trainer's layers save on ``device``, op by op.

    Args:
        kernels: what the config asks for.
        model: norm, heads and window are read.
        device: kind of device.
        precision: fp32, or any other with two bytes an activation.
    """
    ops: dict[PlainOp, tuple[str, str]] = {
        "norm": (model.norm, kernels.norm),
        "activation": ("activation", kernels.activation),
        "cross_entropy": ("cross_entropy", kernels.cross_entropy),
    }
    plain = {op for op, (name, asked) in ops.items() if implementation_of(name, asked, device) == "reference"}
    taken = implementation_of("attention", kernels.attention, device)
    if taken in ("sdpa", "reference"):  # torch's own attention cannot compute a part of the keys
        plain.add("attention_block")
    attention, windowed = (_attention(taken, model, device, precision, kernels.documents, window) for window in (False, True))
    return Saving(attention=attention, windowed=windowed, plain=frozenset(plain), gated_tensors=OURS.gated_tensors)


def _attention(taken: str, model: ModelShape, device: Device, precision: str, documents: bool, window: bool) -> Attention:
    if taken == "reference":
        return "math"
    if taken != "sdpa":
        return "fused"
    # torch 2.13, sdp_utils.cpp: its flash kernel takes no fp32 and no mask, its memory-efficient one no grouped heads. cuDNN's takes all but
    # fp32, where torch prefers it; which devices and builds those are changes from release to release, and a plan does not count on it.
    is_masked = documents or window
    if device == "cuda" and model.num_heads != model.num_kv_heads and (is_masked or precision == "fp32"):
        return "math"
    return "row_masks" if documents else "one_mask" if window else "fused"
