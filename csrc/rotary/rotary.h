// Rotary position embedding (Su et al., arXiv:2104.09864) in the layout of halves: element i of a head and element i + H/2 are a pair
// that is turned by the angle of position and i. The definition is dist_llm/kernels/rotary/reference.py; the schema is in native.py
// beside it.
//
//   rotary(x, cos, sin, inverse) -> y      first half: x1 cos - x2 sin, second half: x2 cos + x1 sin; inverse turns by the negative angle
// Backward is the same function of the gradient, turned the other way.
//
// Shapes   x, y: (B, T, N, H), H even; cos, sin: (B, T, 1, H/2).
// Dtypes   x fp32 or bf16 (CUDA: fp16 too), y as x; cos and sin fp32. Computed in fp32 and rounded once.
// Memory   x: any strides over B, T and N, elements of a head side by side: a part of a fused projection is read where it lies. cos and
//          sin: any strides over B and T. y: contiguous, every element is written. No argument is changed.
#pragma once

#include "common/checks.h"

namespace dist_llm::rotary {

struct Shape {
  int64_t batch, tokens, heads, half;
  int64_t x_strides[3];  // over B, T, N
  int64_t cos_strides[2], sin_strides[2];
};

inline void check_table(const Tensor& table, const Tensor& x, const char* name) {
  const bool fits = table.dim() == 4 && table.size(0) == x.size(0) && table.size(1) == x.size(1) && table.size(2) == 1 &&
                    table.size(3) * 2 == x.size(3);
  STD_TORCH_CHECK(fits, name, " ", shape_of(table), " must be (B, T, 1, H/2) for x (B, T, N, H) ", shape_of(x));
  STD_TORCH_CHECK(
      table.scalar_type() == ScalarType::Float, name, " must be fp32, not ", torch::headeronly::toString(table.scalar_type()));
  STD_TORCH_CHECK(table.size(3) == 1 || table.stride(3) == 1 || table.numel() == 0, name, " must have a last dimension of stride 1, not ", table.stride(3));
  check_same_device(table, x, name, "x");
}

inline Shape check_input(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) >= 2 && x.size(3) % 2 == 0, "x ", shape_of(x), " must be (B, T, N, H) with H even");
  STD_TORCH_CHECK(x.stride(3) == 1 || x.numel() == 0, "x must have a last dimension of stride 1, not ", x.stride(3), "; call .contiguous() on it first");
  check_table(cos, x, "cos");
  check_table(sin, x, "sin");
  return {x.size(0), x.size(1), x.size(2), x.size(3) / 2, {x.stride(0), x.stride(1), x.stride(2)},
          {cos.stride(0), cos.stride(1)}, {sin.stride(0), sin.stride(1)}};
}

inline Tensor new_result(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

}  // namespace dist_llm::rotary
