"""Values on their way between a caller and its ranks.

Both ends are our own processes on one machine and the files lie in a directory only this user can open; they live as long as one
call. The format is multiprocessing's own, as in any of its pipes: functions and classes travel by name, so they must be
importable on both sides. Tensors travel by value: torch's way for multiprocessing shares memory with the sender, and a rank
is gone when its answer is read.
"""

from __future__ import annotations

import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["load_value", "save_value"]


def save_value(value: Any, path: Path) -> None:
    """Write ``value`` to ``path``.

    Tensors (strided, any device) arrive on the CPU as leaves of no graph; two that share memory arrive apart.

    Raises:
        TypeError, AttributeError: something in it cannot leave its process (an open file, a lambda, a sparse tensor).
    """
    path.write_bytes(_ByValue.dumps(value))


def load_value(path: Path) -> Any:
    """The value that ``save_value`` wrote."""
    return ForkingPickler.loads(path.read_bytes())


class _ByValue(ForkingPickler):
    def reducer_override(self, obj: Any) -> Any:
        torch = sys.modules.get("torch")  # a process that never imported it has no tensors
        if torch is None or not isinstance(obj, torch.Tensor):
            return NotImplemented
        if type(obj) not in (torch.Tensor, torch.nn.Parameter) or obj.layout is not torch.strided:
            raise TypeError(
                f"a {type(obj).__name__} of layout {obj.layout} cannot travel between processes; send a plain tensor (.to_local(), .to_dense())"
            )
        # The same bytes whatever the dtype; numpy has no bfloat16.
        flat = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        is_parameter = type(obj) is torch.nn.Parameter
        requires_grad = obj.requires_grad and obj.is_leaf
        return _rebuild, (flat.numpy().tobytes(), str(obj.dtype).removeprefix("torch."), tuple(obj.shape), is_parameter, requires_grad)


def _rebuild(data: bytes, dtype: str, shape: tuple[int, ...], is_parameter: bool, requires_grad: bool) -> torch.Tensor:
    import torch

    kind = getattr(torch, dtype)
    # frombuffer refuses an empty buffer. A bytearray, since the tensor may be written to.
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(kind).reshape(shape) if data else torch.empty(shape, dtype=kind)
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.requires_grad_(requires_grad)
