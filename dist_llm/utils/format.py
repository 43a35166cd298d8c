"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["byte_size"]


def byte_size(count: float) -> str:
    """A number of bytes with a binary unit: 17 B, 3.0 MiB."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"
