"""What a training system does with the hardware: which kernels it has, what it overlaps, what it computes twice.

Facts about systems, not fitted numbers: a system's papers and code say whether it has fused attention, whether element-wise
chains are compiled into single kernels, and which communication it hides behind computation.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODERN", "Recompute", "Software"]


@dataclass(frozen=True)
class Recompute:
    """Shares of a layer's forward that the backward computes again."""

    gemm: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    collectives: float = 0.0

    @classmethod
    def full(cls) -> Recompute:
        """Everything, tensor-parallel sums included."""
        return cls(1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Software:
    """A training system.

    ``attention``: ``fused`` never writes the T x T scores; ``plain`` writes them, and computes the masked half as well.
    ``attention_speed``: speed of the fused kernel over the best published one for the device.
    ``passes``: memory traffic of element-wise work over that of fully fused kernels.
    ``tp_overlap``, ``dp_overlap``, ``pp_overlap``, ``cp_overlap``, ``ep_overlap``: share of the collective's time that may run behind computation.
    ``dropout``: plain attention drops scores, one more chain over them.
    ``accumulate_bytes``: traffic per parameter of adding a micro-batch's gradients to the sum, 0 where the product does it.
    ``layer_overhead_s``: host time of a layer and micro-batch, forward and backward, that computation does not hide.
    ``gathers_every_micro``: ZeRO-3 under a pipeline gathers parameters for every micro-batch, not once a step.
    ``once_a_node``: experts' tokens cross to a node once, however many of its ranks want them (DeepEP, HybridEP).
    ``imbalance``: tokens of the busiest rank of experts over the mean; all wait for it.
    ``fp8_speed``: of 8-bit products relative to those with one scale a tensor.
    """

    attention: str = "fused"
    attention_speed: float = 1.0
    passes: float = 1.0
    tp_overlap: float = 0.0
    dp_overlap: float = 1.0
    pp_overlap: float = 1.0
    cp_overlap: float = 1.0
    ep_overlap: float = 0.0
    once_a_node: bool = False
    dropout: bool = False
    accumulate_bytes: float = 0.0
    layer_overhead_s: float = 0.0
    gathers_every_micro: bool = True
    fp8_speed: float = 1.0
    imbalance: float = 1.0
    grad_bytes: int = 4  # of a gradient in the reduction
    loss_bytes: float = 12.0  # traffic per logit of softmax and loss, beyond the head's own products
    selective: Recompute = Recompute(attention=1.0)  # what the system means by it; Korthikanti et al., arXiv:2205.05198


MODERN = Software()
