"""Softmax cross-entropy, summed over rows; alone, behind a linear layer, and for a vocabulary divided over ranks."""

from dist_llm.kernels.cross_entropy.native import (
    cross_entropy_backward_native,
    cross_entropy_native,
    cross_entropy_partials_native,
    linear_cross_entropy_native,
    why_not_native,
)
from dist_llm.kernels.cross_entropy.reference import (
    cross_entropy_backward_reference,
    cross_entropy_partials_reference,
    cross_entropy_reference,
    linear_cross_entropy_reference,
)
from dist_llm.kernels.impl import Impl, always

__all__ = ["BACKWARD_IMPLS", "IMPLS", "LINEAR_IMPLS", "PARTIALS_IMPLS"]

IMPLS = (  # best first; the last one always runs
    Impl("cross_entropy", "native", cross_entropy_native, why_not_native),
    Impl("cross_entropy", "reference", cross_entropy_reference, always),
)

LINEAR_IMPLS = (
    Impl("cross_entropy", "native", linear_cross_entropy_native, why_not_native),
    Impl("cross_entropy", "reference", linear_cross_entropy_reference, always),
)

PARTIALS_IMPLS = (
    Impl("cross_entropy", "native", cross_entropy_partials_native, why_not_native),
    Impl("cross_entropy", "reference", cross_entropy_partials_reference, always),
)

BACKWARD_IMPLS = (
    Impl("cross_entropy", "native", cross_entropy_backward_native, why_not_native),
    Impl("cross_entropy", "reference", cross_entropy_backward_reference, always),
)
