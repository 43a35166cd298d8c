"""Reads a wandb offline run file: a log of checksummed pieces in 32 KiB blocks, each record a protobuf message.

The layout is LevelDB's log: after wandb's seven-byte file header come pieces of crc32 (over type and data,
without LevelDB's mask), length and type. A record that does not fit into the rest of a block goes on in the next.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")
_FILE_HEADER = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _pieces(raw: bytes) -> Iterator[tuple[int, bytes]]:
    at = _FILE_HEADER
    while at < len(raw):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER.size:  # too little for a header: zeros up to the next block
            at += left
            continue
        if len(raw) - at < _HEADER.size:
            raise ValueError(f"torn header at byte {at}")
        crc, length, kind = _HEADER.unpack_from(raw, at)
        data = raw[at + _HEADER.size : at + _HEADER.size + length]
        if len(data) != length:
            raise ValueError(f"torn record at byte {at}")
        if zlib.crc32(bytes([kind]) + data) != crc:
            raise ValueError(f"wrong checksum at byte {at}")
        yield kind, data
        at += _HEADER.size + length


def read_records(path: Path) -> Iterator[Any]:
    """Every record of a ``.wandb`` file as wandb's own message."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw = path.read_bytes()
    if raw[:4] != b":W&B":
        raise ValueError(f"{path} is no wandb run file: it begins with {raw[:4]!r}")
    message = b""
    for kind, data in _pieces(raw):
        message = data if kind in (_FULL, _FIRST) else message + data
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(message)
            yield record


def read_wandb_offline(path: Path) -> list[dict[str, Any]]:
    """The history rows of one ``.wandb`` file, in order: {name: value}."""
    rows = []
    for record in read_records(path):
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows
