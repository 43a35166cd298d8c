"""Time of one operation on one device: matrix products, attention, and traffic to memory.

Each is the larger of its arithmetic over the device's rate and its bytes over the memory's rate (Williams, Waterman and Patterson,
"Roofline", 2009), with two losses that come from the shape of a matrix product: the last wave of tiles is half empty on average,
and each tile fills and drains a pipeline along K.
"""

from __future__ import annotations

from dist_llm.planning.cluster import Cluster

__all__ = ["attention_seconds", "element_bytes", "gemm_seconds", "memory_seconds"]

TILE = 128 * 256  # output elements of a tile: CUTLASS's default for large products since Ampere
FILL = 256.0  # elements of K that filling and draining a tile's pipeline cost
MEMORY_FRACTION = 0.85  # of the data sheet's bandwidth; STREAM-like kernels reach 0.85 to 0.92
SOFTMAX_WIDTH = 32.0  # head elements whose products take as long as one exponential and its bookkeeping
ALIGNED = 64  # elements a row must be a multiple of for full-width loads since Ampere (NVIDIA, "Matrix Multiplication Background")
UNALIGNED = 0.85  # of the rate where it is not
BLOCK = 128.0  # queries of an attention tile: what the diagonal wastes at short rows


def gemm_seconds(m: float, n: float, k: float, cluster: Cluster, precision: str) -> float:
    """Seconds of (m x k) @ (k x n).

    precision: of the inputs, a key of the cluster's peaks.
    """
    tiles = m * n / TILE
    efficiency = tiles / (tiles + 0.5 * cluster.multiprocessors) * k / (k + FILL)
    if n % ALIGNED or k % ALIGNED:
        efficiency *= UNALIGNED
    rate = cluster.peak(precision) * cluster.clock_fraction * cluster.matmul_fraction * efficiency
    in_bytes = 1.0 if precision in ("fp8", "fp4") else element_bytes(precision)
    traffic = in_bytes * (m * k + k * n) + element_bytes(precision) * m * n
    return max(2.0 * m * n * k / rate, traffic / (cluster.memory_bandwidth * MEMORY_FRACTION)) + cluster.launch


def attention_seconds(
    rows: float,
    seq_len: float,
    heads: float,
    head_dim: float,
    cluster: Cluster,
    *,
    kernel: float,
    backward: bool,
    precision: str = "bf16",
    window: int | None = None,
) -> float:
    """Seconds of fused causal attention: 4 T^2/2 H multiply-adds' FLOPs a head and row, five products backward for two forward.

    kernel: speed of the kernel in use relative to the best published one for this device. window: tokens that a token sees; what lies
    before them is skipped, but for the tiles that the window's edge cuts, which are wasted as those of the diagonal are.
    """
    seen = min(window or seq_len, seq_len)
    pairs = rows * heads * seq_len * (seen + BLOCK) * (2 - seen / seq_len) / 2
    flops = 4.0 * head_dim * pairs * (2.5 if backward else 1.0)
    # Exponentials do not shrink with the head: small heads wait for them (FlashAttention-3, section 1).
    width = (head_dim / (head_dim + SOFTMAX_WIDTH)) * (128 + SOFTMAX_WIDTH) / 128
    share = (cluster.attention_backward if backward else cluster.attention_forward) * min(1.0, kernel) * width
    return flops / (cluster.peak(precision) * cluster.clock_fraction * share) + cluster.launch


def element_bytes(precision: str) -> float:
    """Bytes of an activation: two but in fp32; what multiplies in 8 bits is kept in 16."""
    return 4.0 if precision == "fp32" else 2.0


def memory_seconds(num_bytes: float, cluster: Cluster) -> float:
    """Seconds to move ``num_bytes`` to or from the device's memory."""
    return num_bytes / (cluster.memory_bandwidth * MEMORY_FRACTION)
