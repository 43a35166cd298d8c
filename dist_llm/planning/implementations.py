"""Which implementation of an op a run takes on a kind of device, as far as it can be known without torch.

``kernels/impl.py`` chooses on the spot, by asking each implementation why it cannot run. A plan is made before, often for another
machine: there it is taken that the extension is built, and that no vendor library is installed.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["BEST_FIRST", "NEVER_RUN", "Device", "implementation_of"]

Device = Literal["cpu", "cuda"]

# Kind of device -> implementations that compile, and pass their tests in an emulator or against a stub, but have never run on one. `auto`
# passes over them there; asked for by name they run. Whoever has run `pytest -m gpu` green takes the names out.
NEVER_RUN = {"cuda": frozenset({"native", "flash_attn", "apex"})}

# The ops whose implementations differ in what they save for the backward pass; a test holds the order to that of their tables.
BEST_FIRST = {
    "activation": ("native", "reference"),
    "attention": ("flash_attn", "native", "sdpa", "reference"),
    "cross_entropy": ("native", "reference"),
    "layer_norm": ("native", "apex", "reference"),
    "rms_norm": ("native", "apex", "reference"),
}
_VENDORS = ("flash_attn", "apex")  # another's, for CUDA alone


def implementation_of(op: str, requested: str, device: Device) -> str:
    """The name of what computes ``op``.

    Args:
        op: a key of ``BEST_FIRST``.
        requested: ``auto`` or a name, as in the ``kernels`` section of a config.
        device: where the run computes.
    """
    if requested != "auto":
        return requested
    return next(name for name in BEST_FIRST[op] if name not in NEVER_RUN.get(device, ()) and name not in _VENDORS)
