"""Pipeline stages of a model are cut by what their blocks and the head cost."""

from __future__ import annotations

import itertools

import pytest

from dist_llm.config.schema import ModelConfig
from dist_llm.planning.stages import stage_layers


def model(*, num_layers: int, vocab_size: int, d_model: int = 64) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size, d_model=d_model, num_layers=num_layers, num_heads=4, max_seq_len=64, ffn_dim=4 * d_model, activation="gelu"
    )


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("vocab_size", [64, 5_000, 50_000])
def test_the_dearest_stage_is_as_cheap_as_any_cut_allows(vocab_size: int, num_stages: int) -> None:
    layers, d, seq_len = 12, 64, 128
    stages = stage_layers(model(num_layers=layers, vocab_size=vocab_size), seq_len, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(layers)) and all(stages) and len(stages) == num_stages
    # Multiply-adds a token: 4 D^2 of attention's matrices, 8 D^2 of the MLP's, T D of scores and sums over the causal half; D V of the head.
    block, head = 12 * d * d + seq_len * d, d * vocab_size

    def dearest(sizes: list[int]) -> int:
        return max(size * block + (head if i == num_stages - 1 else 0) for i, size in enumerate(sizes))

    inner = itertools.combinations(range(1, layers), num_stages - 1)
    best = min(dearest([b - a for a, b in itertools.pairwise((0, *cuts, layers))]) for cuts in inner)
    assert dearest([len(stage) for stage in stages]) == best


def test_a_large_head_takes_layers_from_the_last_stage_and_a_long_row_gives_them_back() -> None:
    assert [len(s) for s in stage_layers(model(num_layers=8, vocab_size=32), 128, 4)] == [2, 2, 2, 2]
    # The head costs 2.6 blocks at 128 tokens; at 16,384 tokens a block is 16 times dearer and the head 0.16 of one.
    assert [len(s) for s in stage_layers(model(num_layers=8, vocab_size=2_400), 128, 2)] == [5, 3]
    assert [len(s) for s in stage_layers(model(num_layers=8, vocab_size=2_400), 16_384, 2)] == [4, 4]


def test_a_window_makes_blocks_of_long_rows_cheap_again() -> None:
    whole = model(num_layers=8, vocab_size=2_400)
    windowed = whole.model_copy(update={"window": 64})
    assert [len(s) for s in stage_layers(windowed, 16_384, 2)] == [5, 3] != [len(s) for s in stage_layers(whole, 16_384, 2)]
    # Dear and cheap layers in turns, of five the first, third and fifth dear: three stages have one of those each.
    alternate = model(num_layers=5, vocab_size=64).model_copy(update={"window": 64, "window_layers": "alternate"})
    dear = [sum(layer % 2 == 0 for layer in stage) for stage in stage_layers(alternate, 16_384, 3)]
    assert dear == [1, 1, 1]


def test_more_stages_than_layers_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="4 layers cannot be cut into 5"):
        stage_layers(model(num_layers=4, vocab_size=64), 32, 5)
