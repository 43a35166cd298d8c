"""Mixture of experts: the choice of experts, rows sorted by expert and brought back, and the experts' MLPs."""

from dist_llm.kernels.impl import Impl, always
from dist_llm.kernels.moe.mlp import expert_mlp_native, why_not_native_mlp
from dist_llm.kernels.moe.native import (
    moe_permute_native,
    moe_route_native,
    moe_unpermute_native,
    why_not_native,
    why_not_native_route,
)
from dist_llm.kernels.moe.reference import (
    expert_mlp_reference,
    moe_permute_reference,
    moe_route_reference,
    moe_unpermute_reference,
)

__all__ = ["MLP_IMPLS", "PERMUTE_IMPLS", "ROUTE_IMPLS", "UNPERMUTE_IMPLS"]

ROUTE_IMPLS = (  # best first; the last one always runs
    Impl("moe", "native", moe_route_native, why_not_native_route),
    Impl("moe", "reference", moe_route_reference, always),
)

PERMUTE_IMPLS = (
    Impl("moe", "native", moe_permute_native, why_not_native),
    Impl("moe", "reference", moe_permute_reference, always),
)

UNPERMUTE_IMPLS = (
    Impl("moe", "native", moe_unpermute_native, why_not_native),
    Impl("moe", "reference", moe_unpermute_reference, always),
)

MLP_IMPLS = (
    Impl("moe", "native", expert_mlp_native, why_not_native_mlp),
    Impl("moe", "reference", expert_mlp_reference, always),
)
