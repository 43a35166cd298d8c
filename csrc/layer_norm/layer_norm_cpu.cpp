// LayerNorm on CPU, forward and backward; the contract is in layer_norm.h, the row kernels in layer_norm_rows.inc.
#include "layer_norm/layer_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/columns.h"
#include "common/isa.h"
#include "common/pair_vec.h"
#include "common/tensors.h"

namespace dist_llm::layer_norm {

// Rows that are computed together, where so many stay in the first-level cache.
constexpr int kGroup = 4;

template <class S>
struct ForwardArgs {
  const S* x;
  const S* residual;    // null: no residual, and summed is not used
  const float* weight;  // this and bias in the order of pair_columns.inc
  const float* bias;
  S* y;
  S* summed;
  float* mean;
  float* rstd;
  int64_t dim;
  float eps;
  bool group;
  bool stream;  // y is too large to be found in a cache when it is next read
};

template <class S>
struct BackwardArgs {
  const S* dy;
  const S* x;
  const float* weight;
  const float* mean;
  const float* rstd;
  const S* dsummed;  // null: nothing to add
  S* dx;
  int64_t dim;
  bool group;
  bool stream;
};

}  // namespace dist_llm::layer_norm

#define DL_ISA_SOURCE "layer_norm/layer_norm_rows.inc"
#include "common/foreach_isa.h"

namespace dist_llm {
namespace {

using layer_norm::BackwardArgs;
using layer_norm::ForwardArgs;
using layer_norm::kGroup;
using layer_norm::Shape;

// Elements a thread should have before another one is worth waking.
constexpr int64_t kGrain = 16384;
// Rows that share a partial sum of dweight and dbias: a function of the shape alone, so that threads do not change the result.
constexpr int64_t kRowsPerPart = 64;
constexpr int64_t kMaxParts = 128;

struct ForwardResult {
  Tensor y;
  Tensor mean;
  Tensor rstd;
};

// summed is written where residual is not null.
ForwardResult run_forward(
    const Tensor& x, const Tensor* residual, const Tensor& weight, const std::optional<Tensor>& bias, double eps, Tensor* summed) {
  const Shape shape = layer_norm::check_input(x, weight);
  layer_norm::check_bias(bias, weight);
  if (residual != nullptr) layer_norm::check_like_x(*residual, x, "residual");
  ForwardResult result{torch::stable::empty_like(x), layer_norm::new_row_numbers(x), layer_norm::new_row_numbers(x)};
  with_types(x, weight, "layer_norm", [&](auto s, auto w) {
    using S = decltype(s);
    using W = decltype(w);
    const int64_t stride = padded(shape.dim);
    Tensor numbers = torch::stable::new_empty(x, {2, stride}, ScalarType::Float);
    float* ordered = out<float>(numbers);
    DL_PER_ISA(order_columns<S, W>(in<W>(weight), shape.dim, ordered))
    if (bias.has_value()) {
      DL_PER_ISA(order_columns<S, W>(in<W>(*bias), shape.dim, ordered + stride))
    } else {
      std::fill_n(ordered + stride, stride, 0.f);
    }
    const ForwardArgs<S> args{
        in<S>(x), residual == nullptr ? nullptr : in<S>(*residual), ordered, ordered + stride, out<S>(result.y),
        summed == nullptr ? nullptr : out<S>(*summed), out<float>(result.mean), out<float>(result.rstd), shape.dim,
        static_cast<float>(eps), stays_in_cache<S>(kGroup * shape.dim), is_worth_streaming(out<S>(result.y), shape.rows, shape.dim)};
    const int64_t grain = std::max<int64_t>(1, kGrain / shape.dim);
    torch::stable::parallel_for(0, shape.rows, grain, [&](int64_t begin, int64_t end) { DL_PER_ISA(forward<S>(args, begin, end)) });
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  ForwardResult result = run_forward(x, nullptr, weight, bias, eps, nullptr);
  return {result.y, result.mean, result.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_residual_cpu(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  Tensor summed = torch::stable::empty_like(x);
  ForwardResult result = run_forward(x, &residual, weight, bias, eps, &summed);
  return {result.y, summed, result.mean, result.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& dsummed,
    bool with_bias) {
  const Shape shape = layer_norm::check_input(x, weight);
  layer_norm::check_like_x(dy, x, "dy");
  layer_norm::check_row_numbers(mean, x, shape.rows, "mean");
  layer_norm::check_row_numbers(rstd, x, shape.rows, "rstd");
  if (dsummed.has_value()) layer_norm::check_like_x(*dsummed, x, "dsummed");
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::empty_like(weight);
  Tensor dbias = torch::stable::new_empty(weight, {with_bias ? shape.dim : 0});

  const int64_t rows_per_part = std::max(kRowsPerPart, (shape.rows + kMaxParts - 1) / kMaxParts);
  const int64_t parts = (shape.rows + rows_per_part - 1) / rows_per_part;
  const int64_t stride = padded(shape.dim);
  // The weight in order, then for each part its sums of dweight and of dbias.
  Tensor numbers = torch::stable::new_empty(x, {1 + 2 * parts, stride}, ScalarType::Float);
  float* ordered = out<float>(numbers);
  float* sums = ordered + stride;

  with_types(x, weight, "layer_norm", [&](auto s, auto w) {
    using S = decltype(s);
    using W = decltype(w);
    DL_PER_ISA(order_columns<S, W>(in<W>(weight), shape.dim, ordered))
    const BackwardArgs<S> args{
        in<S>(dy), in<S>(x), ordered, in<float>(mean), in<float>(rstd), dsummed.has_value() ? in<S>(*dsummed) : nullptr, out<S>(dx),
        shape.dim, stays_in_cache<S>(2 * kGroup * shape.dim), is_worth_streaming(out<S>(dx), shape.rows, shape.dim)};
    const int64_t grain = std::max<int64_t>(1, kGrain / (rows_per_part * shape.dim));
    torch::stable::parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
      // The last rows first: of x and dy, which were read and written from the first row on, they are the likeliest to be in a cache.
      for (int64_t part = end; part-- > begin;) {
        float* sum = sums + 2 * part * stride;
        std::fill_n(sum, 2 * stride, 0.f);
        const int64_t first = part * rows_per_part;
        const int64_t last = std::min(first + rows_per_part, shape.rows);
        DL_PER_ISA(backward<S>(args, sum, sum + stride, first, last))
      }
    });
    W* total_weight = out<W>(dweight);
    W* total_bias = with_bias ? out<W>(dbias) : nullptr;
    for_column_ranges(shape.dim, parts, [&](int64_t begin, int64_t end) {
      DL_PER_ISA(add_parts<S, W>(sums, parts, 2 * stride, shape.dim, total_weight, begin, end))
      if (total_bias != nullptr) {
        DL_PER_ISA(add_parts<S, W>(sums + stride, parts, 2 * stride, shape.dim, total_bias, begin, end))
      }
    });
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&dist_llm::layer_norm_cpu));
  m.impl("layer_norm_residual", TORCH_BOX(&dist_llm::layer_norm_residual_cpu));
  m.impl("layer_norm_backward", TORCH_BOX(&dist_llm::layer_norm_backward_cpu));
}
