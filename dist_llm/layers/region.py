"""Where activations go from one form to another between tensor-parallel ranks.

Between blocks the residual stream is whole on every rank, or, under sequence parallelism, each rank holds a stretch of the
tokens (Korthikanti et al., arXiv:2205.05198, section 4.2). Inside attention and MLP every rank sees all tokens and computes
its part of the features. ``enter`` and ``leave`` are the two crossings; with one rank they are the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_llm.comm.autograd import copy_to_group, gather_from_group, reduce_from_group, reduce_scatter_to_group
from dist_llm.comm.context import SINGLE, Group

__all__ = ["WHOLE", "TensorRegion"]

_TOKENS = 1  # dimension of the tokens in (B, T, ...)


@dataclass(frozen=True)
class TensorRegion:
    """Tensor-parallel ranks and how they divide work.

    Attributes:
        tp: ranks that share the matrices.
        sequence: outside attention and MLP they share the tokens.
        kv: ranks that hold copies of the same key-value heads.
    """

    tp: Group = SINGLE
    sequence: bool = False
    kv: Group = SINGLE

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T or T/tp, D) of the residual stream -> (B, T, D), to be multiplied by column-parallel matrices."""
        return gather_from_group(x, self.tp, _TOKENS) if self.sequence else copy_to_group(x, self.tp)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D), this rank's summand of a row-parallel product -> the sum, (B, T or T/tp, D)."""
        return reduce_scatter_to_group(x, self.tp, _TOKENS) if self.sequence else reduce_from_group(x, self.tp)

    def shared(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter that every rank holds whole and uses outside: under sequence parallelism on its own tokens only.

        Then its gradient is summed over the ranks here, in fp32, so that whoever finishes gradients finds it whole.
        """
        return copy_to_group(parameter.float(), self.tp) if self.sequence else parameter

    def own_tokens(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's stretch of a tensor of all tokens (positions, columns), as the residual stream is divided.

        Raises:
            ValueError: the tokens are not divisible by the ranks.
        """
        if not self.sequence:
            return x
        if x.shape[dim] % self.tp.size != 0:
            raise ValueError(f"{x.shape[dim]} tokens must be divisible by tp ({self.tp.size}) under sequence parallelism")
        part = x.shape[dim] // self.tp.size
        return x.narrow(dim, self.tp.rank * part, part)


WHOLE = TensorRegion()
