"""What each function of torch.distributed moves: its collective, its group and its bytes, read from its arguments.

Every entry has the parameter names of the function it stands for, so the arguments of a call can be handed on as they came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["MEASURES", "METHOD_MEASURES", "Call"]


@dataclass(frozen=True)
class Call:
    """One call, before the size of its group is known.

    Attributes:
        collective: name in ``planning.wire``.
        group: process group, or None for the world.
        payload_bytes: as ``planning.wire`` defines it.
        parts: bytes for each rank of the group, when they need not be equal (all_to_all).
    """

    collective: str
    group: Any
    payload_bytes: int
    parts: tuple[int, ...] | None = None


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sizes(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return tuple(_size(t) for t in tensors)


def _all_reduce(tensor: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Call:
    return Call("all_reduce", group, _size(tensor))


def _all_reduce_coalesced(tensors: Any, op: Any = None, group: Any = None, async_op: bool = False) -> Call:
    return Call("all_reduce", group, _size(tensors) if isinstance(tensors, torch.Tensor) else sum(_sizes(tensors)))


def _reduce(
    tensor: torch.Tensor, dst: Any = None, op: Any = None, group: Any = None, async_op: bool = False, group_dst: Any = None
) -> Call:
    return Call("reduce", group, _size(tensor))


def _broadcast(tensor: torch.Tensor, src: Any = None, group: Any = None, async_op: bool = False, group_src: Any = None) -> Call:
    return Call("broadcast", group, _size(tensor))


def _all_gather(tensor_list: Any, tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Call:
    return Call("all_gather", group, sum(_sizes(tensor_list)))


def _all_gather_single(output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Call:
    return Call("all_gather", group, _size(output_tensor))


def _all_gather_coalesced(output_tensor_lists: Any, input_tensor_list: Any, group: Any = None, async_op: bool = False) -> Call:
    return Call("all_gather", group, sum(sum(_sizes(tensors)) for tensors in output_tensor_lists))


def _reduce_scatter(output: torch.Tensor, input_list: Any, op: Any = None, group: Any = None, async_op: bool = False) -> Call:
    return Call("reduce_scatter", group, sum(_sizes(input_list)))


def _reduce_scatter_single(output: torch.Tensor, input: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Call:
    return Call("reduce_scatter", group, _size(input))


def _all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    group: Any = None,
    async_op: bool = False,
) -> Call:
    if not input_split_sizes:
        return Call("all_to_all", group, _size(input))
    row = _size(input) // max(1, input.shape[0])
    return Call("all_to_all", group, _size(input), tuple(row * int(rows) for rows in input_split_sizes))


def _all_to_all(output_tensor_list: Any, input_tensor_list: Any, group: Any = None, async_op: bool = False) -> Call:
    parts = _sizes(input_tensor_list)
    return Call("all_to_all", group, sum(parts), parts)


def _gather(
    tensor: torch.Tensor, gather_list: Any = None, dst: Any = None, group: Any = None, async_op: bool = False, group_dst: Any = None
) -> Call:
    return Call("gather", group, _size(tensor))


def _scatter(
    tensor: torch.Tensor, scatter_list: Any = None, src: Any = None, group: Any = None, async_op: bool = False, group_src: Any = None
) -> Call:
    return Call("scatter", group, _size(tensor))


def _send(tensor: torch.Tensor, dst: Any = None, group: Any = None, tag: int = 0, group_dst: Any = None) -> Call:
    return Call("send", group, _size(tensor))


def _recv(tensor: torch.Tensor, src: Any = None, group: Any = None, tag: int = 0, group_src: Any = None) -> Call:
    return Call("recv", group, _size(tensor))


def _method_send(self: Any, tensors: Any, *args: Any) -> Call:
    del args
    return Call("send", self, sum(_sizes(tensors)))


def _method_recv(self: Any, tensors: Any, *args: Any) -> Call:
    del args
    return Call("recv", self, sum(_sizes(tensors)))


def _barrier(group: Any = None, async_op: bool = False, device_ids: Any = None, timeout: Any = None) -> Call:
    return Call("barrier", group, 0)


def _monitored_barrier(group: Any = None, timeout: Any = None, wait_all_ranks: bool = False) -> Call:
    return Call("barrier", group, 0)


# A name that a release of torch lacks is skipped: 2.13 has the *_single functions, earlier ones have only their older names.
# batch_isend_irecv and the object collectives are not here: they call others of this list, once for each tensor.
MEASURES: dict[str, Callable[..., Call]] = {
    "all_reduce": _all_reduce,
    "all_reduce_coalesced": _all_reduce_coalesced,
    "reduce": _reduce,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "all_gather_single": _all_gather_single,
    "all_gather_into_tensor": _all_gather_single,
    "_all_gather_base": _all_gather_single,
    "all_gather_coalesced": _all_gather_coalesced,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_single": _reduce_scatter_single,
    "reduce_scatter_tensor": _reduce_scatter_single,
    "_reduce_scatter_base": _reduce_scatter_single,
    "all_to_all": _all_to_all,
    "all_to_all_single": _all_to_all_single,
    "gather": _gather,
    "scatter": _scatter,
    "send": _send,
    "recv": _recv,
    "barrier": _barrier,
    "monitored_barrier": _monitored_barrier,
}

# Methods of ProcessGroup. isend and irecv are not wrapped as functions: torch compares the function that a P2POp was given with its
# own, so both a reference from before and one from now must be the original. All of them come through here.
METHOD_MEASURES: dict[str, Callable[..., Call]] = {
    "send": _method_send,
    "recv": _method_recv,
    "recv_anysource": _method_recv,
}
