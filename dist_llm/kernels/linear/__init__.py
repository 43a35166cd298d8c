"""Linear layers: a product and a bias."""

from dist_llm.kernels.impl import Impl, always
from dist_llm.kernels.linear.onednn import linear_onednn, why_not_onednn
from dist_llm.kernels.linear.reference import linear_reference

__all__ = ["IMPLS"]

IMPLS = (  # best first; the last one always runs
    Impl("linear", "onednn", linear_onednn, why_not_onednn),
    Impl("linear", "reference", linear_reference, always),
)
