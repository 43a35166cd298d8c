"""What passes between ranks, whoever sends it: seconds, calls and bytes by (group, collective).

DeepSpeed calls ``torch.distributed`` by itself, so the only place where all communication of a step passes is that module:
while a ``CommLedger`` runs, its functions are wrapped, in the package and in the module that defines them. Code that keeps a
reference to a collective (DeepSpeed does) must look it up while the ledger runs; point-to-point transfers are seen whatever was
kept. DTensor's functional collectives do not pass here.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch.distributed as dist

from dist_llm.comm.context import Group
from dist_llm.comm.measure import MEASURES, METHOD_MEASURES, Call
from dist_llm.planning.wire import Counts, Traffic, traffic

__all__ = ["CommLedger"]


class CommLedger:
    """Context manager; ``take`` gives seconds and ``take_counts`` the traffic since each was last asked.

    Nested calls (a collective that is built from another one) count once, as the outermost. A call that raises counts its time
    and no bytes; one with ``async_op=True`` counts its bytes and the time to start it. Groups of one rank count nothing.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._counts: Counts = {}
        self._names_by_handle: dict[int, str] = {}
        self._names_by_ranks: dict[tuple[int, ...], str] = {}
        # Backward runs in threads of autograd's own on a GPU: what is nested in what is a matter of one thread.
        self._depths = threading.local()
        self._lock = threading.Lock()
        self._originals: list[tuple[Any, str, Callable[..., Any]]] = []

    def __enter__(self) -> CommLedger:
        for name in MEASURES:
            defined = getattr(getattr(dist, "distributed_c10d", None), name, None)
            original = getattr(dist, name, defined)
            if original is None:  # this release of torch has no such function, or no distributed at all
                continue
            wrapped = self._wrap(original, MEASURES[name])
            for module in (dist, dist.distributed_c10d) if defined is original else (dist,):
                self._replace(module, name, wrapped)
        for name, measure in METHOD_MEASURES.items():
            if hasattr(dist, "ProcessGroup"):
                self._replace(dist.ProcessGroup, name, self._wrap(getattr(dist.ProcessGroup, name), measure))
        return self

    def __exit__(self, *exc: object) -> None:
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
        self._originals.clear()

    def name_groups(self, groups: Mapping[str, Group]) -> None:
        """Call groups by their names from now on, as ``ParallelContext.named_groups`` gives them; the first name of a group stays.

        A process group that is not among them, but has the ranks of one that is, gets that name too: DeepSpeed makes copies.
        """
        for key, group in groups.items():
            name = group.name or key
            if group.handle is not None:
                self._names_by_handle.setdefault(id(group.handle), name)
            self._names_by_ranks.setdefault(tuple(group.ranks), name)

    def take(self) -> float:
        """Seconds in collectives since the last call."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds

    def take_counts(self) -> Counts:
        """Traffic of this rank by (group name, collective) since the last call; ``planning.wire.summarize`` makes it JSON."""
        with self._lock:
            counts, self._counts = self._counts, {}
        return counts

    def _replace(self, owner: Any, name: str, wrapped: Callable[..., Any]) -> None:
        self._originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, wrapped)

    def _wrap(self, original: Callable[..., Any], measure: Callable[..., Call]) -> Callable[..., Any]:
        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            depth = getattr(self._depths, "value", 0)
            if depth > 0 or not self._originals:  # not running: whoever kept a reference gets the plain function
                return original(*args, **kwargs)
            self._depths.value = 1
            start = time.perf_counter()
            try:
                answer = original(*args, **kwargs)
            finally:
                self._depths.value = 0
                seconds = time.perf_counter() - start
                with self._lock:
                    self._seconds += seconds
            self._count(measure(*args, **kwargs))
            return answer

        return counted

    def _count(self, call: Call) -> None:
        group = dist.group.WORLD if call.group is None else call.group
        if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:  # this rank is not a member: nothing was sent
            return
        size = dist.get_world_size(group)
        if size == 1:
            return
        if call.parts is None:
            added = traffic(call.collective, size, call.payload_bytes)
        else:  # exactly what goes to others
            added = Traffic(1, call.payload_bytes, Fraction(call.payload_bytes - call.parts[dist.get_rank(group)]))
        key = (self._name(group), call.collective)
        with self._lock:
            self._counts[key] = self._counts.get(key, Traffic()) + added

    def _name(self, group: dist.ProcessGroup) -> str:
        if name := self._names_by_handle.get(id(group)):
            return name
        ranks = tuple(dist.get_process_group_ranks(group))
        return self._names_by_ranks.get(ranks) or "ranks " + ",".join(map(str, ranks))
