"""How a step is divided over devices, as planning sees it: the sizes of the axes and of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["LayoutShape"]


@dataclass(frozen=True)
class LayoutShape:
    """Sizes of the axes, the batch in rows, and what is divided or computed twice.

    Ranks: tp x cp x dp x pp, fastest-varying first; experts are divided over ``ep`` of the tp x cp x dp ranks of a stage.
    ``zero``: 0 to 3 as DeepSpeed's stages (3: FSDP). ``shard_size``: ranks that a ZeRO-3 copy is divided over, with replicas of it
    beyond (hybrid sharding); default all of dp x cp.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    zero: int = 1
    micro_batch: int = 1
    global_batch: int = 1
    virtual_pp: int = 1
    recompute: Literal["none", "selective", "full"] = "none"
    precision: str = "bf16"
    sequence_parallel: bool = True
    shard_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "cp", "ep", "micro_batch", "global_batch", "virtual_pp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero must be 0, 1, 2 or 3, got {self.zero}")
        if self.recompute not in ("none", "selective", "full"):
            raise ValueError(f"recompute must be none, selective or full, got '{self.recompute}'")

    @property
    def ranks(self) -> int:
        """Devices of the run."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def num_micro(self) -> int:
        """Micro-batches a pipeline works on in one step; a rest is a micro-batch of its own."""
        return max(1, -(-self.global_batch // (self.dp * self.micro_batch)))

    @property
    def shard_ranks(self) -> int:
        """Ranks that ZeRO divides over."""
        whole = self.dp * self.cp
        return whole if self.shard_size is None else max(1, min(self.shard_size, whole))
