"""Published tables of parameters, tokens and FLOPs, from their shapes. Each test names its source."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.load import load_config
from dist_llm.config.schema import ModelConfig
from dist_llm.planning.count import count_params, flops_per_token
from dist_llm.planning.count_shapes import (
    checkpoint_bytes_of,
    export_bytes,
    flops_of_token,
    shape_params,
    token_bytes,
    training_flops,
)
from dist_llm.planning.memory import checkpoint_bytes
from dist_llm.planning.shapes import ModelShape, from_config

ROOT = Path(__file__).parents[2]


def gpt(layers: int, width: int, heads: int, head_dim: int, rows: int) -> ModelShape:
    return ModelShape(
        num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=heads, head_dim=head_dim, ffn_dim=4 * width, gated=False,
        vocab_size=50257, seq_len=rows, tied=True, learned_positions=rows, bias=True, norm="layer_norm",
    )  # fmt: skip


def llama(layers: int, width: int, heads: int, ffn: int) -> ModelShape:
    return ModelShape(
        num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=heads, head_dim=128, ffn_dim=ffn, gated=True,
        vocab_size=32000, seq_len=2048, tied=False,
    )  # fmt: skip


# Jiang et al. 2024 (arXiv:2401.04088), table 1, and the public config of Mixtral-8x7B-v0.1.
MIXTRAL = ModelShape(
    num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14336, gated=True, vocab_size=32000,
    seq_len=4096, tied=False, num_experts=8, experts_per_token=2,
)  # fmt: skip
GPT3 = gpt(96, 12288, 96, 128, 2048)


# Brown et al. 2020 (arXiv:2005.14165): layers, width, heads and head size of table 2.1, its printed size, and the millions of
# parameters and the training FLOPs for 300B tokens of table D.1.
@pytest.mark.parametrize(
    ("layers", "width", "heads", "head_dim", "printed", "millions", "flops"),
    [
        pytest.param(12, 768, 12, 64, "125M", 125, "2.25e+20", id="Small"),
        pytest.param(24, 1024, 16, 64, "350M", 356, "6.41e+20", id="Medium"),
        pytest.param(24, 1536, 16, 96, "760M", 760, "1.37e+21", id="Large"),
        pytest.param(32, 2560, 32, 80, "2.7B", 2_650, "4.77e+21", id="2.7B"),
        pytest.param(32, 4096, 32, 128, "6.7B", 6_660, "1.20e+22", id="6.7B"),
        pytest.param(96, 12288, 96, 128, "175B", 174_600, "3.14e+23", id="175B"),
    ],
)
def test_gpt3_sizes_are_those_of_their_shapes(
    layers: int, width: int, heads: int, head_dim: int, printed: str, millions: int, flops: str
) -> None:
    total = shape_params(gpt(layers, width, heads, head_dim, 2048)).total
    unit = 1 if millions < 1000 else 10 if millions < 100_000 else 100  # last digit that table D.1 prints
    assert round(total / 1e6 / unit) * unit == millions
    assert f"{training_flops(total, 300e9):.2e}" == flops
    size, letter = float(printed[:-1]), printed[-1]
    # Table 2.1 to its rounding; 355.9M is printed as 350M.
    assert total / {"M": 1e6, "B": 1e9}[letter] == pytest.approx(size, abs=0.05 if size < 10 else 6 if printed == "350M" else 0.5)


def test_gpt3_xl_is_printed_with_heads_wider_than_its_model() -> None:
    """Table 2.1, inconsistent row: 24 heads of 128 are 3072 and d_model is 2048. With 16 heads it has the printed 1.3B."""
    assert round(shape_params(gpt(24, 2048, 16, 128, 2048)).total / 1e9, 1) == 1.3
    assert round(shape_params(gpt(24, 2048, 24, 128, 2048)).total / 1e9, 1) == 1.5
    # Table D.1 prints 1,320M; 16 heads are 1,315.7M.
    assert shape_params(gpt(24, 2048, 16, 128, 2048)).total / 1e6 == pytest.approx(1_320, rel=0.004)


def test_gpt3_13b_is_printed_with_a_width_its_heads_do_not_fill() -> None:
    """Table 2.1, inconsistent row: d_model 5140 beside 40 heads of 128, which are 5120. Table D.1 counts the latter: 12,850M."""
    at_5120, at_5140 = (shape_params(gpt(40, width, 40, 128, 2048)).total for width in (5120, 5140))
    assert round(at_5120 / 1e6, -1) == 12_850
    assert f"{training_flops(at_5120, 300e9):.2e}" == "2.31e+22"
    assert round(at_5140 / 1e9, 2) == 12.94
    assert round(40 * 12 * 5140**2 / 1e9 + 52_305 * 5140 / 1e9, 2) == 12.95  # with square attention matrices of 5140


# The released checkpoints; Radford et al. 2019, table 2 prints 117M, 345M, 762M and 1542M, which its authors have since called wrong.
@pytest.mark.parametrize(
    ("label", "params", "millions", "layers", "width", "heads"),
    [
        (117, 124_439_808, 124.4, 12, 768, 12),
        (345, 354_823_168, 354.8, 24, 1024, 16),
        (762, 774_030_080, 774.0, 36, 1280, 20),
        (1542, 1_557_611_200, 1557.6, 48, 1600, 25),
    ],
)
def test_gpt2_counts_are_not_those_of_its_paper(label: int, params: int, millions: float, layers: int, width: int, heads: int) -> None:
    total = shape_params(gpt(layers, width, heads, 64, 1024)).total
    assert total == params
    assert round(total / 1e6, 1) == millions
    assert round(total / 1e6) != label


# Touvron et al. 2023 (arXiv:2302.13971), table 2, with the MLP widths of the public configs; the counts of the released weights.
@pytest.mark.parametrize(
    ("shape", "params", "printed"),
    [
        pytest.param(llama(32, 4096, 32, 11008), 6_738_415_616, 6.7, id="7B"),
        pytest.param(llama(40, 5120, 40, 13824), 13_015_864_320, 13.0, id="13B"),
        pytest.param(llama(60, 6656, 52, 17920), 32_528_943_616, 32.5, id="33B"),
        pytest.param(llama(80, 8192, 64, 22016), 65_285_660_672, 65.3, id="65B"),
    ],
)
def test_llama_counts_are_exact(shape: ModelShape, params: int, printed: float) -> None:
    count = shape_params(shape)
    assert count.total == count.active == params
    # The paper prints 65.2 for 65.29B.
    assert abs(count.total / 1e9 - printed) < 0.1


def test_mixtral_counts_are_exact_total_and_active() -> None:
    count = shape_params(MIXTRAL)
    assert count.total == 46_702_792_704
    assert count.active == 12_879_925_248
    assert count.total - count.active == 32 * 6 * 3 * 4096 * 14336  # six experts of eight, 32 layers, three matrices


def test_a_shared_expert_and_dense_layers_count_as_they_are_met() -> None:
    shape = ModelShape(
        num_layers=5, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, ffn_dim=32, gated=True, vocab_size=100, seq_len=16,
        tied=True, num_experts=6, experts_per_token=2, shared_experts=1, expert_ffn_dim=10, dense_layers=1, moe_every=2,
    )  # fmt: skip
    attention, norms = 8 * 4 * (2 + 2 * 1) + 2 * 4 * 8, 2 * 8
    expert, dense, router = 3 * 8 * 10, 3 * 8 * 32, 8 * 6
    common = 5 * (attention + norms) + 8 + 100 * 8 + 3 * dense + 2 * (router + expert)
    count = shape_params(shape)
    assert (count.total, count.active, count.embedding) == (common + 2 * 6 * expert, common + 2 * 2 * expert, 800)


models = st.builds(
    ModelConfig,
    vocab_size=st.integers(2, 3000), d_model=st.sampled_from([8, 24, 64]), num_layers=st.integers(1, 5), num_heads=st.sampled_from([2, 4]),
    num_kv_heads=st.sampled_from([None, 1, 2]), head_dim=st.sampled_from([None, 6]), ffn_dim=st.sampled_from([None, 40]), max_seq_len=st.just(32),
    norm=st.sampled_from(["rms_norm", "layer_norm"]), position=st.sampled_from(["rotary", "learned"]),
    activation=st.sampled_from(["swiglu", "gelu"]), bias=st.booleans(), tie_embeddings=st.booleans(),
    window=st.sampled_from([None, 1, 5, 32, 100]), window_layers=st.sampled_from(["all", "alternate"]),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(models, st.integers(1, 32))
def test_every_config_counts_as_the_trainer_counts_it(model: ModelConfig, seq_len: int) -> None:
    shape, mine = from_config(model, seq_len), count_params(model)
    count = shape_params(shape)
    assert (count.total, count.active, count.embedding) == (mine.total, mine.total, mine.embedding)
    assert flops_of_token(shape).model == pytest.approx(flops_per_token(model, seq_len), rel=1e-14)


def test_training_flops_of_gpt3_are_the_printed_ones() -> None:
    """Brown et al. 2020, table D.1: 174,600M parameters, 300B tokens, 3.14E+23."""
    assert f"{training_flops(shape_params(GPT3).total, 300e9):.2e}" == "3.14e+23"


# Parameters and tokens: Hoffmann et al. 2022 (arXiv:2203.15556), table 1.
def test_training_flops_of_gopher_and_chinchilla() -> None:
    """280B on 300B tokens and 70B on 1.4T: 5.04e23 and 5.88e23. The paper states 5.76e23 as the budget both were given (section 3)."""
    assert f"{training_flops(280e9, 300e9):.2e}" == "5.04e+23"
    assert f"{training_flops(70e9, 1.4e12):.2e}" == "5.88e+23"
    assert training_flops(70e9, 1.4e12) / 5.76e23 == pytest.approx(1.02, abs=0.005)


def test_flops_with_recomputation_by_hand() -> None:
    shape = llama(32, 4096, 32, 11008)
    matrices = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    scores = 4 * 32 * 4096 * 1024  # forward, the causal half of 2048 keys
    plain, selective, full = (flops_of_token(shape, recompute=r) for r in ("none", "selective", "full"))
    assert plain.hardware == plain.model == 6 * (matrices + 32000 * 4096) + 3 * scores
    assert selective.hardware - plain.model == scores
    assert full.hardware - plain.model == 2 * matrices + scores
    assert plain.model == selective.model == full.model
    assert flops_of_token(shape, causal=False).attention == 2 * plain.attention


def test_full_recomputation_is_the_formula_of_narayanan() -> None:
    """arXiv:2104.04473, equation 3: 96 B s l h^2 (1 + s/6h + V/16lh), attention over all keys."""
    h, layers, s, v = 12288, 96, 2048, 51200
    shape = ModelShape(
        num_layers=layers, d_model=h, num_heads=96, num_kv_heads=96, head_dim=128, ffn_dim=4 * h, gated=False, vocab_size=v, seq_len=s,
        tied=True,
    )  # fmt: skip
    printed = 96 * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert flops_of_token(shape, recompute="full", causal=False).hardware == pytest.approx(printed, rel=1e-12)


def test_a_token_of_mixtral_costs_what_it_meets() -> None:
    dense = 6 * (shape_params(MIXTRAL).active - 32000 * 4096 - 65 * 4096)  # no look-up, no norms
    assert flops_of_token(MIXTRAL).weights == dense


def test_bytes_on_disk() -> None:
    config = load_config(ROOT / "configs" / "tiny" / "gpt2.yaml").config
    assert checkpoint_bytes_of(count_params(config.model).total) == checkpoint_bytes(config)
    assert export_bytes(6_738_415_616) == 13_476_831_232  # the 13.5 GB of LLaMA 7B's files
    assert token_bytes(1_000, 2**16) == 2_000
    assert token_bytes(1_000, 2**16 + 1) == 4_000
