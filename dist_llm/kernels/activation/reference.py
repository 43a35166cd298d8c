"""Gelu and swiglu in plain PyTorch: the definitions.

The tanh form of gelu (Hendrycks and Gimpel, arXiv:1606.08415), and silu(gate) * up (Shazeer, arXiv:2002.05202); with the biases that come
before and the dropout that comes after them in one MLP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dist_llm.kernels.dropout.reference import check_dropout, dropout_reference

__all__ = ["check_activation", "check_gated", "gelu_reference", "swiglu_reference"]


def gelu_reference(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    p: float = 0.0,
    seed: int = 0,
    site: int = 0,
    samples: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    feature_start: int = 0,
) -> torch.Tensor:
    """gelu(x + bias), in fp32 and rounded once; with ``p`` its dropout.

    Args:
        x: (..., F), fp32 or bf16; with ``p`` (B, T, F). fp64 is computed in fp64: tests measure errors against it.
        bias: (F,), dtype of x or fp32.
        p: probability that dropout zeroes an element, in [0, 1); the arguments that follow count only where it is not 0.
        seed: of the run.
        site: from ``kernels.dropout.site_number``.
        samples: (B,) int64, global number of the sample in each row.
        columns: (T,) int64, index of each token in its row.
        feature_start: of this part, when features are divided over ranks.

    Returns:
        (..., F), dtype of x.

    Raises:
        ValueError: p or a shape is wrong.
    """
    check_activation(x, bias, p, samples, columns)
    y = F.gelu(_biased(x, bias), approximate="tanh")
    return _dropped(y, p, seed, site, samples, columns, feature_start).to(x.dtype)


def swiglu_reference(
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    *,
    p: float = 0.0,
    seed: int = 0,
    site: int = 0,
    samples: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    feature_start: int = 0,
) -> torch.Tensor:
    """silu(gate + gate_bias) * (up + up_bias), in fp32 and rounded once; with ``p`` its dropout.

    Args:
        gate: (..., F), fp32 or bf16; with ``p`` (B, T, F). fp64 is computed in fp64: tests measure errors against it.
        up: like gate.
        gate_bias: (F,), dtype of gate or fp32; both biases or none.
        up_bias: like gate_bias.
        p: probability that dropout zeroes an element, in [0, 1); the arguments that follow count only where it is not 0.
        seed: of the run.
        site: from ``kernels.dropout.site_number``.
        samples: (B,) int64, global number of the sample in each row.
        columns: (T,) int64, index of each token in its row.
        feature_start: of this part, when features are divided over ranks.

    Returns:
        (..., F), dtype of gate.

    Raises:
        ValueError: p, a shape or a pair of biases is wrong.
    """
    check_gated(gate, up, gate_bias, up_bias, p, samples, columns)
    y = F.silu(_biased(gate, gate_bias)) * _biased(up, up_bias)
    return _dropped(y, p, seed, site, samples, columns, feature_start).to(gate.dtype)


def check_activation(
    x: torch.Tensor, bias: torch.Tensor | None, p: float, samples: torch.Tensor | None, columns: torch.Tensor | None
) -> None:
    """Check the arguments that the activations share.

    Raises:
        ValueError: p or a shape is wrong.
    """
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias {tuple(bias.shape)} must have the last dimension of x {tuple(x.shape)}")
    if p == 0.0:
        return
    if samples is None or columns is None:
        raise ValueError(f"dropout with p = {p} needs samples and columns")
    check_dropout(x, p, samples, columns)


def check_gated(
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    p: float,
    samples: torch.Tensor | None,
    columns: torch.Tensor | None,
) -> None:
    """``check_activation`` for two inputs and two biases.

    Raises:
        ValueError: p, a shape or a pair of biases is wrong.
    """
    if up.shape != gate.shape:
        raise ValueError(f"up {tuple(up.shape)} must have the shape of gate {tuple(gate.shape)}")
    if (gate_bias is None) != (up_bias is None):
        raise ValueError(f"swiglu takes both biases or none, not {'up' if gate_bias is None else 'gate'}_bias alone")
    check_activation(gate, gate_bias, p, samples, columns)
    if up_bias is not None and gate_bias is not None and up_bias.shape != gate_bias.shape:
        raise ValueError(f"up_bias {tuple(up_bias.shape)} must have the shape of gate_bias {tuple(gate_bias.shape)}")


def _biased(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) if bias is None else x.to(wide) + bias.to(wide)


def _dropped(
    y: torch.Tensor, p: float, seed: int, site: int, samples: torch.Tensor | None, columns: torch.Tensor | None, feature_start: int
) -> torch.Tensor:
    if p == 0.0:
        return y
    assert samples is not None and columns is not None  # check_activation has seen to it
    return dropout_reference(y, p, seed=seed, site=site, samples=samples, columns=columns, feature_start=feature_start)
