// LayerNorm: y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps), mean and (biased) var over the last dimension (Ba et al.,
// arXiv:1607.06450). The definition is dist_llm/kernels/layer_norm/reference.py; the schemas are in native.py beside it.
//
//   layer_norm(x, weight, bias?, eps) -> (y, mean, rstd)
//   layer_norm_residual(x, residual, weight, bias?, eps) -> (y, summed, mean, rstd)    summed = x + residual, y is the norm of summed
//   layer_norm_backward(dy, x, weight, mean, rstd, dsummed?, with_bias) -> (dx, dweight, dbias)    x is summed where there was a residual
//
// Shapes   x, residual, dy, dsummed, y, summed, dx: (..., D), D >= 1; weight, bias, dweight: (D); mean, rstd: (...), one for each row;
//          dbias: (D), or (0) without with_bias.
// Dtypes   x fp32 or bf16 (CUDA: fp16 too); residual, dy, dsummed, y, summed, dx as x; weight as x or fp32, bias as weight; dweight and
//          dbias as weight; mean and rstd fp32. Computed in fp32 and rounded once; summed is rounded before the norm sees it.
// Memory   all arguments contiguous, on one device; every element of every result is written; no argument is changed.
// Numbers  var comes from deviations from the mean (CUDA) or from a number near it (CPU), not from x^2: exact where the mean is large.
//          The same bits at any number of threads: the rows that share a partial sum of dweight and dbias depend on the shape alone.
#pragma once

#include <optional>

#include "common/checks.h"

namespace dist_llm::layer_norm {

struct Shape {
  int64_t rows;
  int64_t dim;
};

// The checks of all entry points on x and weight.
inline Shape check_input(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "x ", shape_of(x), " must have a last dimension of at least 1");
  const int64_t dim = x.size(x.dim() - 1);
  STD_TORCH_CHECK(
      weight.dim() == 1 && weight.size(0) == dim, "weight ", shape_of(weight), " must have the last dimension of x ", shape_of(x));
  check_contiguous(x, "x");
  check_contiguous(weight, "weight");
  check_same_device(weight, x, "weight", "x");
  return {x.numel() / dim, dim};
}

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& weight) {
  if (!bias.has_value()) return;
  check_same_shape(*bias, weight, "bias", "weight");
  check_same_dtype(*bias, weight, "bias", "weight");
  check_contiguous(*bias, "bias");
  check_same_device(*bias, weight, "bias", "weight");
}

// A second argument that must look like x.
inline void check_like_x(const Tensor& t, const Tensor& x, const char* name) {
  check_same_shape(t, x, name, "x");
  check_same_dtype(t, x, name, "x");
  check_contiguous(t, name);
  check_same_device(t, x, name, "x");
}

// One fp32 number a row.
inline Tensor new_row_numbers(const Tensor& x) {
  return torch::stable::new_empty(x, x.sizes().slice(0, x.dim() - 1), ScalarType::Float);
}

inline void check_row_numbers(const Tensor& t, const Tensor& x, int64_t rows, const char* name) {
  STD_TORCH_CHECK(
      t.numel() == rows && t.scalar_type() == ScalarType::Float, name, " ", shape_of(t), " must be fp32 with one number for each of the ",
      rows, " rows of x");
  check_contiguous(t, name);
  check_same_device(t, x, name, "x");
}

}  // namespace dist_llm::layer_norm
