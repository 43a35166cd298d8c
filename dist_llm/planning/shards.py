"""Which part of each logical tensor a tensor-parallel rank holds.

One table for everybody: the layers that are built from it, the state that goes in and out of checkpoints, and the planner's
counts. Matrices whose outputs are divided (column-parallel) are cut along dim 0, those whose inputs are divided
(row-parallel) along dim 1 (Shoeybi et al., arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_llm.config.schema import ModelConfig

__all__ = ["Slice", "kv_heads_of", "local_shape", "tensor_slice", "vocab_range"]

_COLUMN = ("mlp.gate.weight", "mlp.gate.bias", "mlp.up.weight", "mlp.up.bias")
_QUERY = ("attention.query.weight", "attention.query.bias")
_KEY_VALUE = ("attention.key.weight", "attention.key.bias", "attention.value.weight", "attention.value.bias")


@dataclass(frozen=True)
class Slice:
    """Elements ``start:stop`` of dimension ``dim``.

    ``copies`` ranks next to one another hold the same slice; this rank's is copy number ``copy``.
    """

    dim: int
    start: int
    stop: int
    copies: int = 1
    copy: int = 0


def vocab_range(vocab_size: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """First and one past the last row of the vocabulary that a rank holds; the last rank may hold fewer."""
    part = -(-vocab_size // tp_size)
    return min(vocab_size, tp_rank * part), min(vocab_size, (tp_rank + 1) * part)


def kv_heads_of(num_kv_heads: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """First and one past the last key-value head of a rank; with fewer heads than ranks, neighbours hold the same one."""
    if num_kv_heads >= tp_size:
        part = num_kv_heads // tp_size
        return tp_rank * part, (tp_rank + 1) * part
    head = tp_rank * num_kv_heads // tp_size
    return head, head + 1


def tensor_slice(name: str, model: ModelConfig, tp_size: int, tp_rank: int) -> Slice | None:
    """The part of the logical tensor ``name`` that rank ``tp_rank`` of ``tp_size`` holds; None when every rank holds all of it."""
    if tp_size == 1:
        return None
    if name in ("embedding.weight", "head.weight"):
        return Slice(0, *vocab_range(model.vocab_size, tp_size, tp_rank))
    heads, size = model.num_heads // tp_size, model.head_size
    if name.endswith(_QUERY):
        return Slice(0, tp_rank * heads * size, (tp_rank + 1) * heads * size)
    if name.endswith("attention.output.weight"):
        return Slice(1, tp_rank * heads * size, (tp_rank + 1) * heads * size)
    if name.endswith(_KEY_VALUE):
        first, last = kv_heads_of(model.kv_heads, tp_size, tp_rank)
        copies = max(1, tp_size // model.kv_heads)
        return Slice(0, first * size, last * size, copies, tp_rank % copies)
    ffn = model.ffn_size // tp_size
    if name.endswith(_COLUMN):
        return Slice(0, tp_rank * ffn, (tp_rank + 1) * ffn)
    if name.endswith("mlp.down.weight"):
        return Slice(1, tp_rank * ffn, (tp_rank + 1) * ffn)
    return None


def local_shape(name: str, shape: tuple[int, ...], model: ModelConfig, tp_size: int, tp_rank: int) -> tuple[int, ...]:
    """Shape of the part of ``name`` that a rank holds."""
    part = tensor_slice(name, model, tp_size, tp_rank)
    if part is None:
        return shape
    return tuple(part.stop - part.start if dim == part.dim else size for dim, size in enumerate(shape))
