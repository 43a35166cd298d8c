"""Dropout whose mask belongs to the token and the feature, not to the rank or the moment; alone and with the residual addition."""

from dist_llm.kernels.dropout.native import dropout_add_native, dropout_native, why_not_native
from dist_llm.kernels.dropout.reference import dropout_add_reference, dropout_reference, site_number
from dist_llm.kernels.impl import Impl, always

__all__ = ["ADD_IMPLS", "IMPLS", "site_number"]

IMPLS = (  # best first; the last one always runs
    Impl("dropout", "native", dropout_native, why_not_native),
    Impl("dropout", "reference", dropout_reference, always),
)

ADD_IMPLS = (
    Impl("dropout", "native", dropout_add_native, why_not_native),
    Impl("dropout", "reference", dropout_add_reference, always),
)
