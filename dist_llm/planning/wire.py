"""What a collective puts on the wire: the one definition that the ledger counts with and the formulas predict with.

``payload`` is the whole tensor that the collective is about: the output of an all-gather, the input of a reduce-scatter or an
all-to-all, the tensor of everything else. ``wire`` is what one of n ranks sends by the ring algorithms (Patarasuk and Yuan, J. Parallel
Distrib. Comput. 69, 2009): 2(n-1)/n of the payload for an all-reduce, half of that for its two halves. A tree or a
shared-memory transport sends other amounts; the payload is a fact, the wire bytes are a yardstick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["COLLECTIVES", "Counts", "Traffic", "add_counts", "summarize", "traffic", "wire_share"]

# Share of the payload that a rank sends, as (numerator, denominator) of n. Broadcast and reduce run along a chain in which one of
# the n ranks sends nothing: theirs is the mean over the ranks. A receiver sends nothing; its sender's ledger has the bytes.
_SHARES = {
    "all_reduce": lambda n: Fraction(2 * (n - 1), n),
    "all_gather": lambda n: Fraction(n - 1, n),
    "reduce_scatter": lambda n: Fraction(n - 1, n),
    "all_to_all": lambda n: Fraction(n - 1, n),
    "broadcast": lambda n: Fraction(n - 1, n),
    "reduce": lambda n: Fraction(n - 1, n),
    "gather": lambda n: Fraction(n - 1, n),
    "scatter": lambda n: Fraction(n - 1, n),
    "send": lambda n: Fraction(1),
    "recv": lambda n: Fraction(0),
    "barrier": lambda n: Fraction(0),
}

COLLECTIVES = tuple(_SHARES)


@dataclass(frozen=True)
class Traffic:
    """Calls of one collective in one group, and their bytes; ``wire_bytes`` is exact, so that sums in any order are equal."""

    calls: int = 0
    payload_bytes: int = 0
    wire_bytes: Fraction = Fraction(0)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.calls + other.calls, self.payload_bytes + other.payload_bytes, self.wire_bytes + other.wire_bytes)


Counts = dict[tuple[str, str], Traffic]  # (group name, collective) -> what passed


def wire_share(collective: str, group_size: int) -> Fraction:
    """Part of the payload that one of ``group_size`` ranks sends.

    Raises:
        ValueError: there is no such collective.
    """
    if collective not in _SHARES:
        raise ValueError(f"collective {collective!r} is unknown; it must be one of {', '.join(COLLECTIVES)}")
    return _SHARES[collective](group_size)


def traffic(collective: str, group_size: int, payload_bytes: int, calls: int = 1) -> Traffic:
    """``calls`` calls that move ``payload_bytes`` together; a group of one moves nothing."""
    if group_size == 1:
        return Traffic()
    return Traffic(calls, payload_bytes, wire_share(collective, group_size) * payload_bytes)


def add_counts(*many: Mapping[tuple[str, str], Traffic]) -> Counts:
    """Sum by key, without the keys that saw no call."""
    total: Counts = {}
    for counts in many:
        for key, value in counts.items():
            if value.calls:
                total[key] = total.get(key, Traffic()) + value
    return total


def summarize(counts: Mapping[tuple[str, str], Traffic]) -> dict[str, dict[str, dict[str, float]]]:
    """group -> collective -> calls, bytes, wire_bytes: plain numbers for JSON, sorted by name."""
    answer: dict[str, dict[str, dict[str, float]]] = {}
    for (group, collective), value in sorted(counts.items()):
        row: dict[str, float] = {"calls": value.calls, "bytes": value.payload_bytes, "wire_bytes": float(value.wire_bytes)}
        answer.setdefault(group, {})[collective] = row
    return answer
