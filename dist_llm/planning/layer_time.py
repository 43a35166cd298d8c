"""Seconds that one layer, and the ends of the model, take for one micro-batch on one device.

Matrix products, attention and element-wise traffic are kept apart, so that recomputation can repeat a share of each. Backward of a
matrix product is two products of the same size (inputs' and weights' gradients).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from dist_llm.planning.cluster import Cluster
from dist_llm.planning.roofline import attention_seconds, element_bytes, gemm_seconds, memory_seconds
from dist_llm.planning.shapes import ModelShape
from dist_llm.planning.software import Software

__all__ = ["Cost", "end_seconds", "layer_seconds"]

# Bytes per score of attention that is not fused, forward and backward in 16 bits: scores written, read and written by softmax,
# read and written with a mask by dropout, read by the product with the values; backward the same chain on two operands.
_SCORE_BYTES = {True: (13.0, 16.0), False: (8.0, 10.0)}
PADDING = 128  # a vocabulary is padded to a multiple of this on each rank, as Megatron does
_QUANTISE_BYTES = 5.0  # of an element cast to 8 bits: read for its range, read again, written in two orders


@dataclass(frozen=True)
class Cost:
    """Seconds by kind of work."""

    gemm: float
    attention: float
    elementwise: float

    @property
    def total(self) -> float:
        """Sum."""
        return self.gemm + self.attention + self.elementwise


@functools.lru_cache(maxsize=65536)
def layer_seconds(
    model: ModelShape,
    rows: int,
    tp: int,
    cp: int,
    sequence_parallel: bool,
    precision: str,
    moe: bool,
    software: Software,
    cluster: Cluster,
) -> tuple[Cost, Cost]:
    """(forward, backward) of one layer on ``rows`` rows of the model's length, for one of tp x cp ranks.

    moe: the layer's MLP is a set of experts; how many ranks they are divided over does not change a rank's work.
    """
    tokens = rows * model.seq_len / cp
    products = _layer_products(model, tokens, tp, software.imbalance if moe else None)
    if precision in ("fp8", "fp4") and software.fp8_speed != 1.0:
        cluster = replace(cluster, matmul_fraction=cluster.matmul_fraction * software.fp8_speed)
    forward = sum(gemm_seconds(m, n, k, cluster, precision) for m, n, k in products)
    backward = sum(gemm_seconds(m, k, n, cluster, precision) + gemm_seconds(k, n, m, cluster, precision) for m, n, k in products)
    attention_forward, attention_backward = _attention(model, rows, tp, cp, precision, software, cluster)
    bytes_forward, bytes_backward = _elementwise_bytes(model, tokens, tp, sequence_parallel, precision, moe, software)
    return (
        Cost(forward, attention_forward, memory_seconds(bytes_forward, cluster)),
        Cost(backward, attention_backward, memory_seconds(bytes_backward, cluster)),
    )


@functools.lru_cache(maxsize=65536)
def end_seconds(
    model: ModelShape, tokens: float, tp: int, precision: str, software: Software, cluster: Cluster
) -> tuple[float, float, float]:
    """(embedding forward and backward, head and loss forward, head and loss backward) for ``tokens`` tokens.

    The head computes in 16 bits even where the layers use 8.
    """
    wide = "fp32" if precision == "fp32" else "bf16"
    vocab = -(-model.vocab_size // (PADDING * tp)) * PADDING  # rows of the head on a rank
    embedding = memory_seconds(tokens * model.d_model * 12.0, cluster)  # rows read and written, gradient read and added
    loss = memory_seconds(tokens * vocab * software.loss_bytes, cluster)
    forward = gemm_seconds(tokens, vocab, model.d_model, cluster, wide) + loss / 2
    backward = (
        gemm_seconds(tokens, model.d_model, vocab, cluster, wide) + gemm_seconds(model.d_model, vocab, tokens, cluster, wide) + loss / 2
    )
    return embedding, forward, backward


def _layer_products(model: ModelShape, tokens: float, tp: int, imbalance: float | None) -> list[tuple[float, float, float]]:
    # (m, n, k): rows of the result, its columns, what is summed over. imbalance: of experts, None for a dense MLP.
    d, h = model.d_model, model.head_dim
    heads, keys = model.num_heads / tp, max(1.0, model.num_kv_heads / tp)  # a rank has at least one whole key head
    if model.attention_matrix:
        products = [(tokens, model.attention_matrix / tp / d, float(d))]  # low-rank attention: its narrow matrices as one
    else:
        products = [(tokens, (heads + 2 * keys) * h, float(d)), (tokens, float(d), heads * h)]
    wide = 2 if model.gated else 1
    if imbalance is None:
        return [*products, (tokens, wide * model.ffn_dim / tp, float(d)), (tokens, float(d), model.ffn_dim / tp)]
    # A rank's share of the tokens is divided over tp and each token goes to k experts: however the experts are divided, a rank
    # works on tokens / tp x k rows where all are equally busy.
    routed = imbalance * tokens / tp * model.experts_per_token
    products += [
        (routed, float(wide * model.expert_ffn), float(d)),
        (routed, float(d), float(model.expert_ffn)),
        (tokens / tp, float(model.num_experts), float(d)),
    ]
    if model.shared_experts:
        shared = model.shared_experts * model.expert_ffn
        products += [(tokens, wide * shared / tp, float(d)), (tokens, float(d), shared / tp)]
    return products


def _attention(model: ModelShape, rows: int, tp: int, cp: int, precision: str, software: Software, cluster: Cluster) -> tuple[float, float]:
    # Attention computes in 16 bits even where the products around it use 8.
    wide = "fp32" if precision == "fp32" else "bf16"
    heads, length = model.num_heads / tp, model.seq_len
    if software.attention == "fused":
        # Layers with a window are spread over the stages as the others are: each counts as the mean of all.
        share = model.windowed_layers / model.num_layers

        def fused(backward: bool) -> float:
            whole, windowed = (
                attention_seconds(
                    rows / cp, length, heads, model.head_dim, cluster,
                    kernel=software.attention_speed, backward=backward, precision=wide, window=window,
                )
                for window in (None, model.window)
            )  # fmt: skip
            return (1 - share) * whole + share * windowed

        return fused(False), fused(True)
    # Batched products of length x length x head: the masked half is computed too.
    product = 2 * gemm_seconds(rows / cp * heads * length, length, model.head_dim, cluster, wide)
    scores = rows / cp * heads * length * length
    forward, backward = (memory_seconds(scores * each * element_bytes(precision) / 2, cluster) for each in _SCORE_BYTES[software.dropout])
    return product + forward, 2 * product + backward


def _elementwise_bytes(
    model: ModelShape, tokens: float, tp: int, sequence_parallel: bool, precision: str, moe: bool, software: Software
) -> tuple[float, float]:
    d, size = model.d_model, element_bytes(precision)
    rotary = 0 if model.learned_positions else (model.num_heads + model.num_kv_heads) * model.head_dim / tp
    if moe:
        width = model.experts_per_token * model.expert_ffn / tp + model.shared_experts * model.expert_ffn / tp
        permuted = model.experts_per_token * d / tp  # sent out and brought back, each read and written
    else:
        width, permuted = model.ffn_dim / tp, 0.0
    stream = d / (tp if sequence_parallel else 1)
    # Two norms (read, write; backward read twice, write) and two additions to the stream (read twice, write).
    forward = 10 * stream + 2 * rotary + (3 if model.gated else 2) * width + 4 * permuted
    backward = 12 * stream + 2 * rotary + (5 if model.gated else 3) * width + 4 * permuted
    extra_forward = extra_backward = 0.0
    if precision in ("fp8", "fp4"):
        wide = 2 if model.gated else 1
        heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim / tp
        inputs = 2 * d + model.num_heads * model.head_dim / tp + width
        extra_forward = _QUANTISE_BYTES * inputs
        extra_backward = _QUANTISE_BYTES * (heads + 2 * d + wide * width)
    return (
        tokens * (size * software.passes * forward + extra_forward),
        tokens * (size * software.passes * backward + extra_backward),
    )
