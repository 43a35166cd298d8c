// RMSNorm on CPU, forward and backward; the contract is in rms_norm.h, the row kernels in rms_norm_rows.inc.
#include "rms_norm/rms_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/columns.h"
#include "common/isa.h"
#include "common/pair_vec.h"
#include "common/tensors.h"

namespace dist_llm::rms_norm {

// Rows that are computed together, where so many stay in the first-level cache.
constexpr int kGroup = 4;

template <class S>
struct ForwardArgs {
  const S* x;
  const S* residual;    // null: no residual, and summed is not used
  const float* weight;  // in the order of pair_columns.inc
  S* y;
  S* summed;
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
  const float* rstd;
  const S* dsummed;  // null: nothing to add
  S* dx;
  int64_t dim;
  bool group;
  bool stream;
};

}  // namespace dist_llm::rms_norm

#define DL_ISA_SOURCE "rms_norm/rms_norm_rows.inc"
#include "common/foreach_isa.h"

namespace dist_llm {
namespace {

using rms_norm::BackwardArgs;
using rms_norm::ForwardArgs;
using rms_norm::kGroup;
using rms_norm::Shape;

// Elements a thread should have before another one is worth waking.
constexpr int64_t kGrain = 16384;
// Rows that share a partial sum of dweight: a function of the shape alone, so that threads do not change the result.
constexpr int64_t kRowsPerPart = 64;
constexpr int64_t kMaxParts = 128;

void run_forward(
    const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, Tensor& y, Tensor* summed, Tensor& rstd, Shape shape) {
  with_types(x, weight, "rms_norm", [&](auto s, auto w) {
    using S = decltype(s);
    using W = decltype(w);
    Tensor ordered = torch::stable::new_empty(x, {padded(shape.dim)}, ScalarType::Float);
    DL_PER_ISA(order_columns<S, W>(in<W>(weight), shape.dim, out<float>(ordered)))
    const ForwardArgs<S> args{
        in<S>(x), residual == nullptr ? nullptr : in<S>(*residual), in<float>(ordered), out<S>(y),
        summed == nullptr ? nullptr : out<S>(*summed), out<float>(rstd), shape.dim, static_cast<float>(eps),
        stays_in_cache<S>(kGroup * shape.dim), is_worth_streaming(out<S>(y), shape.rows, shape.dim)};
    const int64_t grain = std::max<int64_t>(1, kGrain / shape.dim);
    torch::stable::parallel_for(0, shape.rows, grain, [&](int64_t begin, int64_t end) { DL_PER_ISA(forward<S>(args, begin, end)) });
  });
}

std::tuple<Tensor, Tensor> rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps) {
  const Shape shape = rms_norm::check_input(x, weight);
  Tensor y = torch::stable::empty_like(x);
  Tensor rstd = rms_norm::new_rstd(x);
  run_forward(x, nullptr, weight, eps, y, nullptr, rstd, shape);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_residual_cpu(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const Shape shape = rms_norm::check_input(x, weight);
  rms_norm::check_like_x(residual, x, "residual");
  Tensor y = torch::stable::empty_like(x);
  Tensor summed = torch::stable::empty_like(x);
  Tensor rstd = rms_norm::new_rstd(x);
  run_forward(x, &residual, weight, eps, y, &summed, rstd, shape);
  return {y, summed, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, const std::optional<Tensor>& dsummed) {
  const Shape shape = rms_norm::check_input(x, weight);
  rms_norm::check_like_x(dy, x, "dy");
  rms_norm::check_rstd(rstd, x, shape.rows);
  if (dsummed.has_value()) rms_norm::check_like_x(*dsummed, x, "dsummed");
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::empty_like(weight);

  const int64_t rows_per_part = std::max(kRowsPerPart, (shape.rows + kMaxParts - 1) / kMaxParts);
  const int64_t parts = (shape.rows + rows_per_part - 1) / rows_per_part;
  const int64_t stride = padded(shape.dim);
  Tensor numbers = torch::stable::new_empty(x, {parts + 1, stride}, ScalarType::Float);
  float* ordered = out<float>(numbers);
  float* sums = ordered + stride;

  with_types(x, weight, "rms_norm", [&](auto s, auto w) {
    using S = decltype(s);
    using W = decltype(w);
    DL_PER_ISA(order_columns<S, W>(in<W>(weight), shape.dim, ordered))
    const BackwardArgs<S> args{
        in<S>(dy), in<S>(x), ordered, in<float>(rstd), dsummed.has_value() ? in<S>(*dsummed) : nullptr, out<S>(dx), shape.dim,
        stays_in_cache<S>(2 * kGroup * shape.dim), is_worth_streaming(out<S>(dx), shape.rows, shape.dim)};
    const int64_t grain = std::max<int64_t>(1, kGrain / (rows_per_part * shape.dim));
    torch::stable::parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
      // The last rows first: of x and dy, which were read and written from the first row on, they are the likeliest to be in a cache.
      for (int64_t part = end; part-- > begin;) {
        float* sum = sums + part * stride;
        std::fill_n(sum, stride, 0.f);
        const int64_t first = part * rows_per_part;
        const int64_t last = std::min(first + rows_per_part, shape.rows);
        DL_PER_ISA(backward<S>(args, sum, first, last))
      }
    });
    W* total = out<W>(dweight);
    for_column_ranges(shape.dim, parts, [&](int64_t begin, int64_t end) {
      DL_PER_ISA(add_parts<S, W>(sums, parts, stride, shape.dim, total, begin, end))
    });
  });
  return {dx, dweight};
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&dist_llm::rms_norm_cpu));
  m.impl("rms_norm_residual", TORCH_BOX(&dist_llm::rms_norm_residual_cpu));
  m.impl("rms_norm_backward", TORCH_BOX(&dist_llm::rms_norm_backward_cpu));
}
