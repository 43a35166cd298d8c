"""All ops and their implementations, and what a run uses of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches

import torch

from dist_llm.kernels import activation, adamw, attention, cross_entropy, dropout, embedding, layer_norm, linear, moe, rms_norm, rotary
from dist_llm.kernels.impl import Impl, select
from dist_llm.utils.errors import ConfigError

__all__ = ["LAYOUT_TABLES", "TABLES", "choices"]

# A function that layers can ask for -> its implementations, best first. Functions of one folder share its config key.
TABLES: dict[str, tuple[Impl, ...]] = {
    "adamw_step": adamw.IMPLS,
    "attention": attention.IMPLS,
    "cross_entropy": cross_entropy.IMPLS,
    "cross_entropy_backward": cross_entropy.BACKWARD_IMPLS,
    "cross_entropy_partials": cross_entropy.PARTIALS_IMPLS,
    "dropout": dropout.IMPLS,
    "dropout_add": dropout.ADD_IMPLS,
    "embedding": embedding.IMPLS,
    "embedding_backward_into": embedding.BACKWARD_INTO_IMPLS,
    "expert_mlp": moe.MLP_IMPLS,
    "gelu": activation.GELU_IMPLS,
    "joint_linear": linear.JOINT_IMPLS,
    "layer_norm": layer_norm.IMPLS,
    "layer_norm_residual": layer_norm.RESIDUAL_IMPLS,
    "linear": linear.IMPLS,
    "linear_cross_entropy": cross_entropy.LINEAR_IMPLS,
    "linear_weight_grad": linear.WEIGHT_GRAD_IMPLS,
    "moe_permute": moe.PERMUTE_IMPLS,
    "moe_route": moe.ROUTE_IMPLS,
    "moe_unpermute": moe.UNPERMUTE_IMPLS,
    "rms_norm": rms_norm.IMPLS,
    "rms_norm_residual": rms_norm.RESIDUAL_IMPLS,
    "rotary": rotary.IMPLS,
    "sum_of_squares": adamw.SUM_OF_SQUARES_IMPLS,
    "swiglu": activation.SWIGLU_IMPLS,
}

# Functions that only some layouts call (ring attention: attention over a part of the keys, and its gradients), chosen only for those:
# an implementation that a config names may do without them.
LAYOUT_TABLES: dict[str, tuple[Impl, ...]] = {
    "attention_block": attention.BLOCK_IMPLS,
    "attention_block_backward": attention.BLOCK_BACKWARD_IMPLS,
}


def choices(
    device: torch.device, dtype: torch.dtype, requested: Mapping[str, str], *, layout_functions: Collection[str] = ()
) -> dict[str, Impl]:
    """The implementation of every function for one run.

    The engine logs the names, and compares them between ranks: two ranks that compute an op differently are not one run.

    Args:
        device: where the run computes.
        dtype: of its activations.
        requested: op -> ``auto`` or a name, as in the ``kernels`` section of a config; an op left out is ``auto``.
        layout_functions: keys of ``LAYOUT_TABLES`` that this run's layout calls.

    Raises:
        ConfigError: an op or a name is unknown, or a named implementation cannot run here.
    """
    ops = sorted({table[0].op for table in TABLES.values()})
    for op in requested:
        if op not in ops:
            near = get_close_matches(op, ops, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the ops are {', '.join(ops)}"
            raise ConfigError(f"kernels.{op}: there is no such op; {hint}")
    tables = {**TABLES, **{function: LAYOUT_TABLES[function] for function in layout_functions}}
    return {function: select(table, requested.get(table[0].op, "auto"), device, dtype) for function, table in tables.items()}
