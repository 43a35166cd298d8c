// Gelu and swiglu on CPU, forward and backward; the contract is in activation.h, the row kernels in activation_rows.inc.
#include "activation/activation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/columns.h"
#include "common/isa.h"
#include "common/pair_vec.h"
#include "common/tensors.h"
#include "common/vec_math.h"
#include "dropout/keep_vec.h"

namespace dist_llm::activation {

// Biases are fp32 in the order of pairs of S (common/pair_columns.inc); null: none.
template <class S>
struct ForwardArgs {
  const S* x;   // gelu's, or swiglu's gate
  const S* up;  // null: gelu
  const float* bias;
  const float* up_bias;
  S* y;
};

template <class S>
struct BackwardArgs {
  const S* dy;
  const S* x;
  const S* up;
  const float* bias;
  const float* up_bias;
  S* dx;
  S* dup;
};

}  // namespace dist_llm::activation

#define DL_ISA_SOURCE "activation/activation_rows.inc"
#include "common/foreach_isa.h"

namespace dist_llm {
namespace {

using activation::BackwardArgs;
using activation::ForwardArgs;
using activation::Shape;
using dropout::Mask;
using OptionalTensor = std::optional<Tensor>;

// Elements a thread should have before another one is worth waking; where a matrix is one long row, its pieces are whole pages.
constexpr int64_t kGrain = 16384;
constexpr int64_t kPiece = 4096;
// Rows that share a partial sum of a bias's gradient: a function of the shape alone, so that threads do not change the result.
constexpr int64_t kRowsPerPart = 32;
constexpr int64_t kMaxParts = 128;

// How exact the formulas are for a result in S.
template <class S>
constexpr Exactness kExactness = sizeof(S) == sizeof(float) ? Exactness::full : Exactness::rough;

// Calls f(begin, end) for ranges of elements.
template <class F>
void for_elements(int64_t count, const F& f) {
  torch::stable::parallel_for(0, (count + kPiece - 1) / kPiece, kGrain / kPiece, [&](int64_t begin, int64_t end) {
    f(begin * kPiece, std::min(end * kPiece, count));
  });
}

// Biases in fp32 and in the order of pairs of S, one after another; what they point into lives as long as this.
template <class S>
struct Biases {
  Tensor storage;
  const float* first = nullptr;
  const float* second = nullptr;

  Biases(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& up_bias, int64_t dim) : storage(x) {
    if (!bias.has_value()) return;
    storage = torch::stable::new_empty(x, {2, padded(dim)}, ScalarType::Float);
    float* to = out<float>(storage);
    order(x, *bias, dim, to);
    first = to;
    if (!up_bias.has_value()) return;
    order(x, *up_bias, dim, to + padded(dim));
    second = to + padded(dim);
  }

 private:
  static void order(const Tensor& x, const Tensor& bias, int64_t dim, float* to) {
    with_types(x, bias, "activation", [&](auto s, auto w) {
      using Same = decltype(s);
      using W = decltype(w);
      DL_PER_ISA(order_columns<Same>(in<W>(bias), dim, to))
    });
  }
};

Tensor forward(
    const Tensor& x, const Tensor* up, const OptionalTensor& bias, const OptionalTensor& up_bias, const std::optional<Mask>& mask,
    Shape shape) {
  Tensor y = torch::stable::empty_like(x);
  with_type(x, "activation", [&](auto s) {
    using S = decltype(s);
    const Biases<S> biases(x, bias, up_bias, shape.dim);
    const ForwardArgs<S> args{in<S>(x), up == nullptr ? nullptr : in<S>(*up), biases.first, biases.second, out<S>(y)};
    if (!mask.has_value() && !bias.has_value()) {
      for_elements(shape.rows * shape.dim, [&](int64_t begin, int64_t end) { DL_PER_ISA(forward_flat<kExactness<S>>(args, begin, end)) });
      return;
    }
    const Mask* drop = mask.has_value() ? &*mask : nullptr;
    torch::stable::parallel_for(0, shape.rows, std::max<int64_t>(1, kGrain / shape.dim), [&](int64_t begin, int64_t end) {
      DL_PER_ISA(forward_rows<kExactness<S>>(args, drop, shape.dim, begin, end))
    });
  });
  return y;
}

// dx, dup (x itself for gelu), and the gradients of the biases.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& x, const Tensor* up, const OptionalTensor& bias, const OptionalTensor& up_bias,
    const std::optional<Mask>& mask, Shape shape) {
  const auto [rows, dim] = shape;
  Tensor dx = torch::stable::empty_like(x);
  Tensor dup = up == nullptr ? dx : torch::stable::empty_like(x);
  Tensor dbias = bias.has_value() ? torch::stable::empty_like(*bias) : torch::stable::new_empty(x, {0});
  Tensor dup_bias = up_bias.has_value() ? torch::stable::empty_like(*up_bias) : torch::stable::new_empty(x, {0});
  with_type(x, "activation", [&](auto s) {
    using S = decltype(s);
    const Biases<S> biases(x, bias, up_bias, dim);
    const BackwardArgs<S> args{
        in<S>(dy), in<S>(x), up == nullptr ? nullptr : in<S>(*up), biases.first, biases.second, out<S>(dx),
        up == nullptr ? nullptr : out<S>(dup)};
    if (!mask.has_value() && !bias.has_value()) {
      for_elements(rows * dim, [&](int64_t begin, int64_t end) { DL_PER_ISA(backward_flat<kExactness<S>>(args, begin, end)) });
      return;
    }
    const Mask* drop = mask.has_value() ? &*mask : nullptr;
    const int64_t rows_per_part = std::max(kRowsPerPart, (rows + kMaxParts - 1) / kMaxParts);
    const int64_t parts = (rows + rows_per_part - 1) / rows_per_part;
    const int64_t stride = padded(dim), size = 2 * stride;
    Tensor partials = torch::stable::new_empty(x, {bias.has_value() ? parts : 0, size}, ScalarType::Float);
    float* sums = out<float>(partials);
    const bool is_exact = bias.has_value() && bias->scalar_type() == ScalarType::Float;
    const int64_t grain = std::max<int64_t>(1, kGrain / (rows_per_part * dim));
    torch::stable::parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        float* sum = bias.has_value() ? sums + part * size : nullptr;
        const int64_t first = part * rows_per_part, last = std::min(first + rows_per_part, rows);
        if (is_exact) {
          DL_PER_ISA(backward_rows<Exactness::full>(args, drop, dim, sum, stride, first, last))
        } else {
          DL_PER_ISA(backward_rows<kExactness<S>>(args, drop, dim, sum, stride, first, last))
        }
      }
    });
    if (!bias.has_value()) return;
    with_types(x, *bias, "activation", [&](auto, auto w) {
      using W = decltype(w);
      for_column_ranges(dim, parts, [&](int64_t begin, int64_t end) {
        DL_PER_ISA(add_parts<S>(sums, parts, size, dim, out<W>(dbias), begin, end))
        if (up_bias.has_value()) DL_PER_ISA(add_parts<S>(sums + stride, parts, size, dim, out<W>(dup_bias), begin, end))
      });
    });
  });
  return {dx, dup, dbias, dup_bias};
}

Tensor gelu_cpu(
    const Tensor& x, const OptionalTensor& bias, double p, int64_t key0, int64_t key1, const OptionalTensor& samples,
    const OptionalTensor& columns, int64_t feature_start) {
  const Shape shape = activation::check_input(x, "x");
  activation::check_bias(bias, x, shape.dim, "bias", "x");
  return forward(x, nullptr, bias, std::nullopt, activation::make_mask(x, p, key0, key1, samples, columns, feature_start), shape);
}

std::tuple<Tensor, Tensor> gelu_backward_cpu(
    const Tensor& dy, const Tensor& x, const OptionalTensor& bias, double p, int64_t key0, int64_t key1, const OptionalTensor& samples,
    const OptionalTensor& columns, int64_t feature_start) {
  const Shape shape = activation::check_input(x, "x");
  activation::check_like(dy, x, "dy", "x");
  activation::check_bias(bias, x, shape.dim, "bias", "x");
  const auto mask = activation::make_mask(x, p, key0, key1, samples, columns, feature_start);
  auto [dx, dup, dbias, dup_bias] = backward(dy, x, nullptr, bias, std::nullopt, mask, shape);
  return {dx, dbias};
}

Shape check_swiglu(const Tensor& gate, const Tensor& up, const OptionalTensor& gate_bias, const OptionalTensor& up_bias) {
  const Shape shape = activation::check_input(gate, "gate");
  activation::check_like(up, gate, "up", "gate");
  activation::check_bias(gate_bias, gate, shape.dim, "gate_bias", "gate");
  activation::check_bias(up_bias, gate, shape.dim, "up_bias", "gate");
  activation::check_biases(gate_bias, up_bias);
  return shape;
}

Tensor swiglu_cpu(
    const Tensor& gate, const Tensor& up, const OptionalTensor& gate_bias, const OptionalTensor& up_bias, double p, int64_t key0,
    int64_t key1, const OptionalTensor& samples, const OptionalTensor& columns, int64_t feature_start) {
  const Shape shape = check_swiglu(gate, up, gate_bias, up_bias);
  const auto mask = activation::make_mask(gate, p, key0, key1, samples, columns, feature_start);
  return forward(gate, &up, gate_bias, up_bias, mask, shape);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_backward_cpu(
    const Tensor& dy, const Tensor& gate, const Tensor& up, const OptionalTensor& gate_bias, const OptionalTensor& up_bias, double p,
    int64_t key0, int64_t key1, const OptionalTensor& samples, const OptionalTensor& columns, int64_t feature_start) {
  const Shape shape = check_swiglu(gate, up, gate_bias, up_bias);
  activation::check_like(dy, gate, "dy", "gate");
  const auto mask = activation::make_mask(gate, p, key0, key1, samples, columns, feature_start);
  return backward(dy, gate, &up, gate_bias, up_bias, mask, shape);
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("gelu", TORCH_BOX(&dist_llm::gelu_cpu));
  m.impl("gelu_backward", TORCH_BOX(&dist_llm::gelu_backward_cpu));
  m.impl("swiglu", TORCH_BOX(&dist_llm::swiglu_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&dist_llm::swiglu_backward_cpu));
}
