from __future__ import annotations

import pytest

from dist_llm.planning.cluster import load_cluster
from dist_llm.planning.roofline import MEMORY_FRACTION, attention_seconds, gemm_seconds, memory_seconds

A100, H100 = load_cluster("a100-80g"), load_cluster("h100-80g")


def rate(m: int, n: int, k: int, precision: str = "bf16") -> float:
    return 2 * m * n * k / gemm_seconds(m, n, k, H100, precision)


def test_a_large_product_reaches_the_measured_share_of_the_peak() -> None:
    # 2 % below: filling 256 of 16384 elements of K, and half a wave of 132 of 8192 tiles.
    assert rate(16384, 16384, 16384) == pytest.approx(H100.matmul_fraction * 989e12, rel=0.03)


def test_narrow_products_are_less_efficient() -> None:
    assert rate(4096, 1024, 4096) < rate(4096, 4096, 4096) < rate(16384, 4096, 4096)
    assert rate(4096, 4096, 512) < 0.8 * rate(4096, 4096, 4096)


def test_a_product_with_one_row_takes_the_time_to_read_the_matrix() -> None:
    read = 2 * 8192 * 8192 / (H100.memory_bandwidth * MEMORY_FRACTION)
    assert gemm_seconds(1, 8192, 8192, H100, "bf16") >= read


def test_eight_bits_double_the_rate() -> None:
    assert rate(16384, 8192, 8192, "fp8") == pytest.approx(2 * rate(16384, 8192, 8192), rel=0.02)  # beside the launch


def test_a_width_that_is_not_a_multiple_of_64_is_slower() -> None:
    assert rate(8192, 1800, 8192) < 0.9 * rate(8192, 1792, 8192)


def test_attention_grows_with_the_square_of_the_row() -> None:
    short = attention_seconds(8, 4096, 32, 128, H100, kernel=1.0, backward=False)
    long = attention_seconds(4, 8192, 32, 128, H100, kernel=1.0, backward=False)
    assert long / short == pytest.approx(2.0, rel=0.03)  # equal tokens; the diagonal's waste halves


def test_a_window_costs_what_lies_in_it_and_the_tiles_that_its_edge_cuts() -> None:
    def seconds(window: int | None) -> float:
        return attention_seconds(8, 16384, 32, 128, H100, kernel=1.0, backward=False, window=window) - H100.launch

    assert seconds(16384) == seconds(20000) == seconds(None)
    # 1024 keys, and half a tile of 128 at either end, of 8192 on average; the first 1024 queries see fewer.
    assert seconds(1024) / seconds(None) == pytest.approx((1024 + 128) / 8192 * (1 - 1024 / 16384 / 2), rel=0.01)


def test_attention_on_an_a100_has_flash_attention_2s_published_speed() -> None:
    # Dao, arXiv:2307.08691, figures 5 and 6: about 190 forward and 170 TFLOP/s backward, causal, head 128, rows of 16k.
    flops = 4 * 128 * 16 * 16384**2 / 2
    forward = flops / attention_seconds(1, 16384, 16, 128, A100, kernel=1.0, backward=False)
    backward = 2.5 * flops / attention_seconds(1, 16384, 16, 128, A100, kernel=1.0, backward=True)
    assert forward == pytest.approx(190e12, rel=0.05)
    assert backward == pytest.approx(170e12, rel=0.05)


def test_small_heads_wait_for_exponentials() -> None:
    # Equal FLOPs: twice the heads of half the size have twice the scores.
    wide = attention_seconds(1, 8192, 16, 128, H100, kernel=1.0, backward=False)
    narrow = attention_seconds(1, 8192, 32, 64, H100, kernel=1.0, backward=False)
    assert narrow > 1.15 * wide


def test_memory_traffic_is_linear() -> None:
    assert memory_seconds(2e9, H100) == pytest.approx(2 * memory_seconds(1e9, H100))
