// Activations of an MLP, with the biases before and the dropout behind in the same pass. The definition is
// dist_llm/kernels/activation/reference.py; the schemas are in native.py beside it.
//
//   gelu(x, bias?, MASK) -> y                                                y = D(gelu(x + bias)), gelu in the tanh form
//   gelu_backward(dy, x, bias?, MASK) -> (dx, dbias)
//   swiglu(gate, up, gate_bias?, up_bias?, MASK) -> y                        y = D(silu(gate + gate_bias) * (up + up_bias))
//   swiglu_backward(dy, gate, up, gate_bias?, up_bias?, MASK) -> (dgate, dup, dgate_bias, dup_bias)
// MASK is (p, key0, key1, samples?, columns?, feature_start), and D the dropout of dropout/dropout.h, or nothing where p is 0.
//
// Shapes   x, gate, up, dy, y, dx, dgate, dup: (..., F), F >= 1, with p > 0 (B, T, F); biases and their gradients: (F), both biases of
//          swiglu or none; the gradient of a bias that is not there: (0). samples: (B), columns: (T).
// Dtypes   x fp32 or bf16 (CUDA: fp16 too); everything of its shape as x; a bias as x or fp32, both alike, its gradient as the bias.
//          Computed in fp32 and rounded once; the gradient of a bias is the sum in fp32 of what is rounded to dx.
// Memory   all arguments contiguous, on one device; every element of every result is written; no argument is changed.
// Numbers  the same bits at any number of threads: the rows that share a partial sum of a bias's gradient depend on the shape alone.
#pragma once

#include <optional>

#include "common/checks.h"
#include "dropout/dropout.h"

namespace dist_llm::activation {

// gelu(v) = v sigmoid(2 sqrt(2 / pi) (v + 0.044715 v^3)) = v sigmoid(v (kGelu + kGeluCube v^2)) (Hendrycks and Gimpel, arXiv:1606.08415).
constexpr double kGelu = 1.5957691216057308;
constexpr double kGeluCube = kGelu * 0.044715;
// Beyond it a sigmoid and its complement are 0 or 1 in fp32 up to 1e-35, and e^-(v (kGelu + kGeluCube v^2)) still fits into fp32.
constexpr float kGeluFlat = 10.f;
constexpr float kSiluFlat = 87.f;
constexpr double kLog2OfE = 1.4426950408889634;

struct Shape {
  int64_t rows;
  int64_t dim;
};

inline Shape check_input(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, name, " ", shape_of(x), " must have a last dimension of at least 1");
  check_contiguous(x, name);
  const int64_t dim = x.size(x.dim() - 1);
  return {x.numel() / dim, dim};
}

// A second argument that must look like x.
inline void check_like(const Tensor& t, const Tensor& x, const char* name, const char* x_name) {
  check_same_shape(t, x, name, x_name);
  check_same_dtype(t, x, name, x_name);
  check_contiguous(t, name);
  check_same_device(t, x, name, x_name);
}

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t dim, const char* name, const char* x_name) {
  if (!bias.has_value()) return;
  STD_TORCH_CHECK(
      bias->dim() == 1 && bias->size(0) == dim, name, " ", shape_of(*bias), " must have the last dimension of ", x_name, " ", shape_of(x));
  const ScalarType type = bias->scalar_type();
  STD_TORCH_CHECK(
      type == x.scalar_type() || type == ScalarType::Float, name, " is ", torch::headeronly::toString(type), "; it must have the dtype of ",
      x_name, ", ", torch::headeronly::toString(x.scalar_type()), ", or be fp32");
  check_contiguous(*bias, name);
  check_same_device(*bias, x, name, x_name);
}

inline void check_biases(const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up_bias) {
  STD_TORCH_CHECK(
      gate_bias.has_value() == up_bias.has_value(), "swiglu takes both biases or none, not ", gate_bias.has_value() ? "gate" : "up",
      "_bias alone");
  if (gate_bias.has_value()) check_same_dtype(*up_bias, *gate_bias, "up_bias", "gate_bias");
}

// The mask, or nothing where nothing is dropped.
inline std::optional<dropout::Mask> make_mask(
    const Tensor& x, double p, int64_t key0, int64_t key1, const std::optional<Tensor>& samples, const std::optional<Tensor>& columns,
    int64_t feature_start) {
  if (p == 0.) return std::nullopt;
  STD_TORCH_CHECK(samples.has_value() && columns.has_value(), "dropout with p = ", p, " needs samples and columns");
  return dropout::make_mask(x, p, key0, key1, *samples, *columns, feature_start);
}

}  // namespace dist_llm::activation
