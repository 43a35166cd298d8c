// RMSNorm: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps), the mean over the last dimension (Zhang and Sennrich,
// arXiv:1910.07467). The definition is dist_llm/kernels/rms_norm/reference.py; the schemas are in native.py beside it.
//
//   rms_norm(x, weight, eps) -> (y, rstd)
//   rms_norm_residual(x, residual, weight, eps) -> (y, summed, rstd)       summed = x + residual, y is the norm of summed
//   rms_norm_backward(dy, x, weight, rstd, dsummed?) -> (dx, dweight)      x is summed where there was a residual
//
// Shapes   x, residual, dy, dsummed, y, summed, dx: (..., D), D >= 1; weight, dweight: (D); rstd: (...), one for each row.
// Dtypes   x fp32 or bf16 (CUDA: fp16 too); residual, dy, dsummed, y, summed, dx as x; weight as x or fp32; dweight as weight;
//          rstd fp32. Everything is computed in fp32 and rounded once, when it is stored; summed is rounded before the norm sees it.
// Memory   all arguments contiguous, on one device; every element of every result is written; no argument is changed.
// Numbers  the same bits at any number of threads: the rows that share a partial sum of dweight depend on the shape alone.
#pragma once

#include "common/checks.h"

namespace dist_llm::rms_norm {

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

// A second argument that must look like x.
inline void check_like_x(const Tensor& t, const Tensor& x, const char* name) {
  check_same_shape(t, x, name, "x");
  check_same_dtype(t, x, name, "x");
  check_contiguous(t, name);
  check_same_device(t, x, name, "x");
}

inline Tensor new_rstd(const Tensor& x) {
  return torch::stable::new_empty(x, x.sizes().slice(0, x.dim() - 1), ScalarType::Float);
}

inline void check_rstd(const Tensor& rstd, const Tensor& x, int64_t rows) {
  STD_TORCH_CHECK(
      rstd.numel() == rows && rstd.scalar_type() == ScalarType::Float, "rstd ", shape_of(rstd),
      " must be fp32 with one number for each of the ", rows, " rows of x");
  check_contiguous(rstd, "rstd");
  check_same_device(rstd, x, "rstd", "x");
}

}  // namespace dist_llm::rms_norm
