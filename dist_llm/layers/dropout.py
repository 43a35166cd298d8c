"""Dropout at one place of a model, by logical position."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from dist_llm.kernels.dropout.reference import site_number

__all__ = ["Dropout", "DropoutFn"]


class DropoutFn(Protocol):
    """Signature of ``kernels.dropout``'s implementations."""

    def __call__(
        self,
        x: torch.Tensor,
        p: float,
        *,
        seed: int,
        site: int,
        samples: torch.Tensor,
        columns: torch.Tensor,
        feature_start: int = 0,
    ) -> torch.Tensor:
        """``kernels.dropout.reference.dropout_reference`` says what of."""
        ...


class Dropout(nn.Module):
    """Zeroes elements while training; which ones depends on names and positions only, so every layout drops the same.

    Raises:
        ValueError: p is outside [0, 1).
    """

    def __init__(self, p: float, *, seed: int, name: str, fn: DropoutFn) -> None:
        """``name`` is the logical name of the place (``layers.3.attention``): the same in every layout, different from every other's."""
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout probability of {name} must be in [0, 1), it is {p}")
        self.p = p
        self.seed = seed
        self.name = name
        self.site = site_number(name)
        self.fn = fn

    def forward(self, x: torch.Tensor, samples: torch.Tensor, columns: torch.Tensor, feature_start: int = 0) -> torch.Tensor:
        """Drop while training, pass ``x`` through in eval mode.

        Args:
            x: (B, T, D), features from ``feature_start`` on.
            samples: (B,) int64, global sample number of each row.
            columns: (T,) int64, index of each of these tokens in its row.
            feature_start: of this rank's part of the features.

        Returns:
            (B, T, D), dtype of x.
        """
        if not self.training or self.p == 0.0:
            return x
        return self.fn(x, self.p, seed=self.seed, site=self.site, samples=samples, columns=columns, feature_start=feature_start)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"p={self.p}, name={self.name!r}"
