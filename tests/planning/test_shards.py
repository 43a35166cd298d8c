"""The parts of all tensor-parallel ranks make up each logical tensor, and are what the built modules hold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from dist_llm.comm.context import Group
from dist_llm.config.load import load_config
from dist_llm.config.schema import ModelConfig
from dist_llm.layers.region import TensorRegion
from dist_llm.models.decoder import Decoder
from dist_llm.planning.count import parameter_shapes
from dist_llm.planning.shards import kv_heads_of, local_shape, tensor_slice, vocab_range
from tests.models.models import REFERENCE, make_config

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs" / "tiny"
TINY = {name: load_config(CONFIGS / f"{name}.yaml", []).config.model for name in ("llama", "gpt2", "packed")}
# 37 rows of vocabulary: no number of ranks divides them.
MODELS = {**TINY, "odd": make_config(bias=True, norm="layer_norm", num_kv_heads=2), "odd, one kv head": make_config(num_kv_heads=1)}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_first_copies_of_all_ranks_cover_each_element_exactly_once(model: ModelConfig, tp: int) -> None:
    for name, shape in parameter_shapes(model).items():
        parts = [tensor_slice(name, model, tp, rank) for rank in range(tp)]
        if any(part is None for part in parts):
            assert all(part is None for part in parts), name
            continue
        (dim,) = {part.dim for part in parts if part is not None}
        covered = Counter(i for part in parts if part is not None and part.copy == 0 for i in range(part.start, part.stop))
        assert covered == Counter(range(shape[dim])), (name, tp)
        for rank, part in enumerate(parts):
            assert part is not None and part.stop > part.start
            # Copies are neighbours, and say which of them they are.
            assert 0 <= part.copy < part.copies and part.copy == rank % part.copies
            first = parts[rank - part.copy]
            assert first is not None and (first.start, first.stop) == (part.start, part.stop)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_local_shapes_are_those_of_the_module_that_is_built(model: ModelConfig, tp: int) -> None:
    for rank in range(tp):
        region = TensorRegion(tp=Group(rank=rank, size=tp))
        with torch.device("meta"):
            built = Decoder(model, REFERENCE, compute_dtype=torch.float32, region=region)
        shapes = {name: local_shape(name, shape, model, tp, rank) for name, shape in parameter_shapes(model).items()}
        assert shapes == {name: tuple(p.shape) for name, p in built.named_parameters()}


def test_what_is_divided_is_what_megatron_divides() -> None:
    divided = {name.removeprefix("blocks.0."): part.dim for name in parameter_shapes(TINY["gpt2"]) if (part := tensor_slice(name, TINY["gpt2"], 2, 1)) and not name.startswith(("blocks.1", "blocks.2", "blocks.3"))}  # fmt: skip
    columns = [f"{m}.{p}" for m in ("attention.query", "attention.key", "attention.value", "mlp.up") for p in ("weight", "bias")]
    # Row-parallel biases, norms and the position table are whole on every rank.
    assert divided == {"embedding.weight": 0, **dict.fromkeys(columns, 0), "attention.output.weight": 1, "mlp.down.weight": 1}


def test_a_vocabulary_that_does_not_divide_leaves_the_last_rank_fewer_rows() -> None:
    assert [vocab_range(10, 4, rank) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [vocab_range(512, 2, rank) for rank in range(2)] == [(0, 256), (256, 512)]


def test_query_heads_meet_their_own_key_value_head_on_every_rank() -> None:
    for heads, kv_heads, tp in ((8, 8, 4), (8, 4, 2), (8, 2, 4), (8, 1, 8), (8, 2, 8), (12, 3, 3), (12, 3, 6)):
        group = heads // kv_heads
        for rank in range(tp):
            first, last = kv_heads_of(kv_heads, tp, rank)
            queries = range(rank * heads // tp, (rank + 1) * heads // tp)
            assert {query // group for query in queries} == set(range(first, last)), (heads, kv_heads, tp, rank)
