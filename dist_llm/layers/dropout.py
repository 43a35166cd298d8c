"""Dropout at one place of a model, by logical position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from dist_llm.kernels.dropout.reference import dropout_add_reference, dropout_reference, site_number

__all__ = ["Dropout", "DropoutAddFn", "DropoutFn"]

DropoutAddFn = Callable[..., torch.Tensor]


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

    def __init__(
        self, p: float, *, seed: int, name: str, fn: DropoutFn = dropout_reference, add_fn: DropoutAddFn = dropout_add_reference
    ) -> None:
        """``name`` is the logical name of the place (``layers.3.attention``): the same in every layout, different from every other's."""
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout probability of {name} must be in [0, 1), it is {p}")
        self.p = p
        self.seed = seed
        self.name = name
        self.site = site_number(name)
        self.fn = fn
        self.add_fn = add_fn

    def forward(
        self,
        x: torch.Tensor,
        samples: torch.Tensor | None,
        columns: torch.Tensor | None,
        feature_start: int = 0,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Drop while training, pass ``x`` through in eval mode; added to ``residual`` where there is one.

        Args:
            x: (B, T, D), features from ``feature_start`` on.
            samples: (B,) int64, global sample number of each row; may be None where nothing is dropped.
            columns: (T,) int64, index of each of these tokens in its row; likewise.
            feature_start: of this rank's part of the features.
            residual: like x, or None.

        Returns:
            (B, T, D), dtype of x.
        """
        if not self.training or self.p == 0.0:
            return x if residual is None else residual + x
        place: dict[str, Any] = {
            "seed": self.seed, "site": self.site, "samples": samples, "columns": columns, "feature_start": feature_start,
        }  # fmt: skip
        return self.fn(x, self.p, **place) if residual is None else self.add_fn(x, residual, self.p, **place)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"p={self.p}, name={self.name!r}"
