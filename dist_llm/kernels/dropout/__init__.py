"""Dropout whose mask belongs to the token and the feature, not to the rank or the moment."""

from dist_llm.kernels.dropout.reference import dropout_reference, site_number
from dist_llm.kernels.impl import Impl, always

__all__ = ["IMPLS", "site_number"]

IMPLS = (  # best first; the last one always runs
    Impl("dropout", "reference", dropout_reference, always),
)
