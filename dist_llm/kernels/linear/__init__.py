"""Linear layers: a product and a bias, and the gradient of the weights."""

from dist_llm.kernels.impl import Impl, always
from dist_llm.kernels.linear.native import joint_linear_native, linear_native, weight_grad_native, why_not_native
from dist_llm.kernels.linear.onednn import joint_linear_onednn, linear_onednn, weight_grad_onednn, why_not_onednn
from dist_llm.kernels.linear.reference import joint_linear_reference, linear_reference, weight_grad_reference

__all__ = ["IMPLS", "JOINT_IMPLS", "WEIGHT_GRAD_IMPLS"]

IMPLS = (  # best first; the last one always runs
    Impl("linear", "native", linear_native, why_not_native),
    Impl("linear", "onednn", linear_onednn, why_not_onednn),
    Impl("linear", "reference", linear_reference, always),
)
JOINT_IMPLS = (
    Impl("linear", "native", joint_linear_native, why_not_native),
    Impl("linear", "onednn", joint_linear_onednn, why_not_onednn),
    Impl("linear", "reference", joint_linear_reference, always),
)
# The gradient by itself, which the other two take.
WEIGHT_GRAD_IMPLS = (
    Impl("linear", "native", weight_grad_native, why_not_native),
    Impl("linear", "onednn", weight_grad_onednn, why_not_onednn),
    Impl("linear", "reference", weight_grad_reference, always),
)
