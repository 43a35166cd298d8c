from __future__ import annotations

import hashlib
import math
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.load import load_config
from dist_llm.models.decoder import Decoder
from dist_llm.models.init import initial_slice, initial_tensor, std_of

from .models import FUSED, make_config

ROOT = Path(__file__).parents[2]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 2**63 - 1))
def test_a_slice_is_that_part_of_the_whole(a: int, b: int, seed: int) -> None:
    start, stop = sorted((a, b))
    whole = initial_slice("blocks.3.mlp.up.weight", 0, 400, std=0.02, seed=seed)
    assert torch.equal(initial_slice("blocks.3.mlp.up.weight", start, stop, std=0.02, seed=seed), whole[start:stop])


def test_a_slice_far_into_a_tensor_needs_nothing_before_it() -> None:
    far = 10**12 + 3  # a whole tensor of this size would not fit anywhere
    ten = initial_slice("w", far, far + 10, std=1.0, seed=1)
    assert torch.equal(initial_slice("w", far + 7, far + 10, std=1.0, seed=1), ten[7:])


def test_names_and_seeds_give_different_numbers() -> None:
    tensors = [initial_slice(name, 0, 1000, std=1.0, seed=seed) for name in ("a", "b", "blocks.1.w", "blocks.11.w") for seed in (0, 1, 11)]
    for i, one in enumerate(tensors):
        for other in tensors[:i]:
            assert not (one == other).any()
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / math.sqrt(1000)


def test_numbers_are_normal() -> None:
    count = 1_000_000
    x = initial_slice("w", 0, count, std=0.5, seed=7).double() / 0.5
    # Five standard errors of each statistic.
    assert abs(float(x.mean())) < 5 / math.sqrt(count)
    assert abs(float(x.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((x**3).mean())) < 5 * math.sqrt(15 / count)
    assert abs(float((x**4).mean()) - 3) < 5 * math.sqrt(96 / count)
    cdf = 0.5 * (1 + torch.erf(x.sort().values / math.sqrt(2)))
    distance = (cdf - (torch.arange(count) + 0.5) / count).abs().max()
    assert float(distance) < 2 / math.sqrt(count)  # Kolmogorov and Smirnov; a chance of 0.0007
    lag = torch.corrcoef(torch.stack([x[:-1], x[1:]]))[0, 1]
    assert abs(float(lag)) < 5 / math.sqrt(count)


def test_the_generator_is_the_one_it_was() -> None:
    # A change of these numbers changes every run: it wants a new checkpoint format, not a new golden value.
    expected = [0.016116239, -0.021093903, -0.0099800909, 0.031491492, -0.011015689, 0.0069448743]
    found = initial_slice("blocks.0.attention.query.weight", 5, 11, std=0.02, seed=1234)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=2e-7, atol=0)


def philox_4x64(counter: int, key: tuple[int, int]) -> list[int]:
    """Ten rounds, from the paper, on Python's integers."""
    mask = 2**64 - 1
    c, k = [counter >> 64 * i & mask for i in range(4)], list(key)
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [right >> 64 ^ c[1] ^ k[0], right & mask, left >> 64 ^ c[3] ^ k[1], left & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


@pytest.mark.parametrize("start", [0, 6, 2**34 + 1])
def test_each_element_is_one_output_of_the_counter_through_the_inverse_normal(start: int) -> None:
    digest = hashlib.sha256(b"42/head.weight").digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    expected = []
    for element in range(start, start + 9):
        bits = philox_4x64(element // 4 + 1, key)[element % 4]  # numpy counts before it draws
        expected.append(3.0 * NormalDist().inv_cdf(((bits >> 12) + 0.5) / 2**52))
    found = initial_slice("head.weight", start, start + 9, std=3.0, seed=42)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=2e-7, atol=0)


def test_initial_weights_do_not_depend_on_the_rest_of_the_model() -> None:
    small, large = (
        Decoder(make_config(num_layers=2, **kind), FUSED, compute_dtype=torch.float32).initial_weights(seed=9)
        for kind in ({}, {"vocab_size": 74, "position": "learned", "tie_embeddings": False, "bias": True, "norm": "layer_norm"})
    )
    shared = [name for name in small if name != "embedding.weight"]
    assert len(shared) > 10
    assert all(torch.equal(small[name], large[name]) for name in shared)
    assert torch.equal(small["embedding.weight"], large["embedding.weight"][:37])  # more rows, the same first ones
    assert list(small) == [name for name, _ in Decoder(make_config(), FUSED, compute_dtype=torch.float32).named_parameters()]


@pytest.mark.parametrize("name", ["llama", "gpt2", "packed"])
def test_initial_weights_have_the_deviation_of_the_config(name: str) -> None:
    config = load_config(ROOT / "configs" / "tiny" / f"{name}.yaml").config.model
    for name, weight in Decoder(config, FUSED, compute_dtype=torch.float32).initial_weights(seed=1).items():
        assert weight.dtype == torch.float32
        if name.endswith(".bias"):
            assert not weight.any(), name
        elif weight.ndim == 1:
            assert (weight == 1).all(), name
        else:
            writes_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            std = config.init_std / math.sqrt(2 * config.num_layers) if writes_residual else config.init_std
            assert abs(float(weight.mean())) < 5 * std / math.sqrt(weight.numel()), name
            assert abs(float(weight.std()) / std - 1) < 5 / math.sqrt(2 * weight.numel()), name


def test_projections_into_the_residual_stream_are_divided_by_the_root_of_the_number_of_writes() -> None:
    for name in ("blocks.7.attention.output.weight", "blocks.0.mlp.down.weight"):
        assert std_of(name, init_std=0.02, num_layers=8) == 0.02 / 4
    for name in ("blocks.7.attention.query.weight", "blocks.0.mlp.up.weight", "embedding.weight", "head.weight"):
        assert std_of(name, init_std=0.02, num_layers=8) == 0.02


def test_biases_are_zero_and_gains_one() -> None:
    assert torch.equal(initial_tensor("final_norm.bias", torch.Size([3]), std=0.02, seed=1), torch.zeros(3))
    assert torch.equal(initial_tensor("final_norm.weight", torch.Size([3]), std=0.02, seed=1), torch.ones(3))
