"""Which of torch's ops a piece of code calls, and how large their results are."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Recorder"]


class Recorder(TorchDispatchMode):
    """``with Recorder() as seen: ...``.

    Attributes:
        ops: names, in their order.
        largest: elements of the largest result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.largest = 0

    @property
    def zeros(self) -> list[str]:
        """The ops that made zeros."""
        return [op for op in self.ops if "zeros" in op]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call it and note what it was."""
        self.ops.append(str(func))
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, (tuple, list)) else (out,):
            self.largest = max(self.largest, result.numel() if isinstance(result, torch.Tensor) else 0)
        return out
