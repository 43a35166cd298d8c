// RMSNorm on CPU, forward and backward; the contract is in rms_norm.h, the row kernels in rms_norm_rows.inc.
#include "rms_norm/rms_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/isa.h"
#include "common/tensors.h"

namespace dist_llm {

template <class S, class W>
struct ForwardArgs {
  const S* x;
  const S* residual;  // null: no residual, and summed is not used
  const W* weight;
  S* y;
  S* summed;
  float* rstd;
  int64_t dim;
  float eps;
};

template <class S, class W>
struct BackwardArgs {
  const S* dy;
  const S* x;
  const W* weight;
  const float* rstd;
  const S* dsummed;  // null: nothing to add
  S* dx;
  int64_t dim;
};

}  // namespace dist_llm

#define DL_ISA_SOURCE "rms_norm/rms_norm_rows.inc"
#include "common/foreach_isa.h"

namespace dist_llm {
namespace {

using rms_norm::Shape;

// Elements a thread should have before another one is worth waking.
constexpr int64_t kGrain = 16384;
// Rows that share a partial sum of dweight: a function of the shape alone, so that threads do not change the result.
constexpr int64_t kRowsPerPart = 32;
constexpr int64_t kMaxParts = 128;

void run_forward(
    const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, Tensor& y, Tensor* summed, Tensor& rstd, Shape shape) {
  with_types(x, weight, "rms_norm", [&](auto s, auto w) {
    using S = decltype(s);
    using W = decltype(w);
    const ForwardArgs<S, W> args{
        in<S>(x), residual == nullptr ? nullptr : in<S>(*residual), in<W>(weight), out<S>(y),
        summed == nullptr ? nullptr : out<S>(*summed), out<float>(rstd), shape.dim, static_cast<float>(eps)};
    const int64_t grain = std::max<int64_t>(1, kGrain / shape.dim);
    torch::stable::parallel_for(0, shape.rows, grain, [&](int64_t begin, int64_t end) { DL_PER_ISA(forward<S, W>(args, begin, end)) });
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
  Tensor partials = torch::stable::new_empty(x, {parts, shape.dim}, ScalarType::Float);
  float* sums = out<float>(partials);

  with_types(x, weight, "rms_norm", [&](auto s, auto w) {
    using S = decltype(s);
    using W = decltype(w);
    const BackwardArgs<S, W> args{
        in<S>(dy), in<S>(x), in<W>(weight), in<float>(rstd), dsummed.has_value() ? in<S>(*dsummed) : nullptr, out<S>(dx), shape.dim};
    const int64_t grain = std::max<int64_t>(1, kGrain / (rows_per_part * shape.dim));
    torch::stable::parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        float* partial = sums + part * shape.dim;
        std::fill_n(partial, shape.dim, 0.f);
        const int64_t first = part * rows_per_part;
        const int64_t last = std::min(first + rows_per_part, shape.rows);
        DL_PER_ISA(backward<S, W>(args, partial, first, last))
      }
    });
    W* total = out<W>(dweight);
    const int64_t columns = std::max<int64_t>(64, kGrain / std::max<int64_t>(1, parts));
    torch::stable::parallel_for(0, shape.dim, columns, [&](int64_t begin, int64_t end) {
      DL_PER_ISA(add_partials<W>(sums, parts, shape.dim, total, begin, end))
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
