"""Collectives on a ``Group``: the identity when the group has one rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.comm.context import Group

__all__ = ["all_reduce_max", "all_reduce_sum", "barrier", "broadcast_json", "gather_json"]


def all_reduce_sum(values: Sequence[float], group: Group, device: torch.device) -> list[float]:
    """Sum each number over the ranks of ``group``; float64, so counts up to 2**53 are exact."""
    if group.size == 1:
        return [float(v) for v in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group.handle)
    return [float(v) for v in tensor.tolist()]


def all_reduce_max(values: Sequence[float], group: Group, device: torch.device) -> list[float]:
    """Largest of each number over the ranks of ``group``."""
    if group.size == 1:
        return [float(v) for v in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group.handle)
    return [float(v) for v in tensor.tolist()]


def barrier(group: Group, device: torch.device) -> None:
    """Return once every rank of ``group`` has come here."""
    all_reduce_max([0.0], group, device)


def broadcast_json(value: Any, group: Group, device: torch.device) -> Any:
    """Rank 0's ``value`` on every rank.

    JSON, not ``broadcast_object_list``: that one is a pickle, and nothing here unpickles what came over a wire.
    """
    if group.size == 1:
        return value
    payload = json.dumps(value).encode() if group.rank == 0 else b""
    size = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    dist.broadcast(size, group=group.handle, group_src=0)
    buffer = torch.zeros(int(size.item()), dtype=torch.uint8, device=device)
    if group.rank == 0:
        buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(buffer, group=group.handle, group_src=0)
    return json.loads(bytes(buffer.cpu().numpy()))


def gather_json(value: Any, group: Group, device: torch.device) -> list[Any]:
    """Every rank's ``value`` on every rank, in rank order."""
    if group.size == 1:
        return [value]
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    longest = int(all_reduce_max([payload.numel()], group, device)[0])
    # An 8-byte length, then the text, padded to the longest: every rank sends the same number of bytes.
    record = torch.zeros(8 + longest, dtype=torch.uint8, device=device)
    record[:8] = torch.tensor(list(payload.numel().to_bytes(8, "little")), dtype=torch.uint8)
    record[8 : 8 + payload.numel()] = payload
    gathered = torch.empty(group.size * record.numel(), dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(gathered, record, group=group.handle)
    answers = []
    for row in gathered.view(group.size, -1).cpu().numpy():
        length = int.from_bytes(bytes(row[:8]), "little")
        answers.append(json.loads(bytes(row[8 : 8 + length])))
    return answers
