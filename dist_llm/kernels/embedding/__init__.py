"""Rows of a table by number, and the gradient of the table, whole or added to one that is there."""

from dist_llm.kernels.embedding.native import embedding_backward_into_native, embedding_native, why_not_native
from dist_llm.kernels.embedding.reference import embedding_backward_into_reference, embedding_reference
from dist_llm.kernels.impl import Impl, always

__all__ = ["BACKWARD_INTO_IMPLS", "IMPLS"]

IMPLS = (  # best first; the last one always runs
    Impl("embedding", "native", embedding_native, why_not_native),
    Impl("embedding", "reference", embedding_reference, always),
)

BACKWARD_INTO_IMPLS = (
    Impl("embedding", "native", embedding_backward_into_native, why_not_native),
    Impl("embedding", "reference", embedding_backward_into_reference, always),
)
