from __future__ import annotations

import pytest

from dist_llm.config.schema import ModelConfig
from dist_llm.planning.count import count_params, flops_per_token
from dist_llm.planning.count_shapes import flops_of_token
from dist_llm.planning.shapes import attended, from_config


def gpt2(width: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=50257, d_model=width, num_layers=layers, num_heads=heads, max_seq_len=1024,
        norm="layer_norm", position="learned", activation="gelu", bias=True, tie_embeddings=True,
    )  # fmt: skip


LLAMA_7B = ModelConfig(
    vocab_size=32000, d_model=4096, num_layers=32, num_heads=32, ffn_dim=11008, max_seq_len=2048, tie_embeddings=False
)  # fmt: skip
# Grouped-query heads whose size is not d_model / num_heads.
MISTRAL_7B = ModelConfig(
    vocab_size=32000, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14336, max_seq_len=32768,
    tie_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "params"),
    [
        pytest.param(gpt2(768, 12, 12), 124_439_808, id="GPT-2 124M"),
        pytest.param(gpt2(1024, 24, 16), 354_823_168, id="GPT-2 355M"),
        pytest.param(gpt2(1280, 36, 20), 774_030_080, id="GPT-2 774M"),
        pytest.param(gpt2(1600, 48, 25), 1_557_611_200, id="GPT-2 1558M"),
        pytest.param(LLAMA_7B, 6_738_415_616, id="LLaMA-7B"),
        pytest.param(MISTRAL_7B, 7_241_732_096, id="Mistral-7B"),
    ],
)
def test_published_models_have_their_published_number_of_parameters(model: ModelConfig, params: int) -> None:
    assert count_params(model).total == params


def test_embedding_counts_the_tables_and_a_tied_head_once() -> None:
    count = count_params(gpt2(768, 12, 12))
    assert count.embedding == (50257 + 1024) * 768
    assert count.non_embedding == 124_439_808 - (50257 + 1024) * 768
    assert count_params(LLAMA_7B).embedding == 2 * 32000 * 4096


def test_flops_of_a_token_by_hand() -> None:
    model = ModelConfig(
        vocab_size=100, d_model=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=10, max_seq_len=32, bias=True,
        norm="layer_norm", position="learned",
    )  # fmt: skip
    block = 8 * 24 + 8 * 12 + 8 * 12 + 24 * 8 + 3 * 8 * 10  # query, key, value, output, swiglu; no vectors
    products = 3 * block + 100 * 8  # the tied head multiplies though it is no matrix of its own; a look-up does not
    # Scores and values: 2 products x 2 FLOPs x (T / 2 keys on average) x 24 numbers forward, three times that with backward.
    attention = 3 * 3 * (2 * 2 * 16 * 24)
    assert flops_per_token(model, seq_len=32) == 6 * products + attention


def test_flops_of_a_windowed_token_are_those_of_the_keys_it_sees() -> None:
    whole = gpt2(768, 4, 12)
    banded = whole.model_copy(update={"window": 100, "window_layers": "alternate"})
    # 1024 tokens: one sees 1 to 100 keys, counted without the half of its own as the whole row's T / 2 is.
    keys = sum(min(t, 100) for t in range(1, 1025)) / 1024
    fewer = 2 * 3 * (2 * 2 * 768) * (512 - keys)
    assert flops_per_token(whole, 1024) - flops_per_token(banded, 1024) == pytest.approx(fewer, rel=2e-3)
    shape = from_config(banded, 1024)
    assert flops_of_token(shape).model == flops_per_token(banded, 1024)
    assert flops_of_token(shape, causal=False).attention == 2 * flops_of_token(shape).attention
    assert shape.attended_tokens == sum(attended(banded.layer_window(layer), 1024) for layer in range(4))
    # A window as long as the row is none.
    assert flops_per_token(banded.model_copy(update={"window": 1024}), 1024) == flops_per_token(whole, 1024)


def test_flops_do_not_depend_on_tying_and_six_n_is_their_larger_part() -> None:
    tied, untied = (LLAMA_7B.model_copy(update={"tie_embeddings": tie}) for tie in (True, False))
    assert flops_per_token(tied, 2048) == flops_per_token(untied, 2048)
    six_n = 6 * (count_params(untied).total - 32000 * 4096)
    assert 1 < flops_per_token(untied, 2048) / six_n < 1.05
