// AdamW on CPU; the contract is in adamw.h, the kernels in adamw_rows.inc.
//
// The list of tensors becomes a flat list of pieces of at most kPiece elements, which threads divide among themselves.
#include "adamw/adamw.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "adamw/adamw_vec.h"
#include "common/isa.h"
#include "common/tensors.h"

namespace dist_llm::adamw {

// Some elements of one parameter, and all that belongs to them.
template <class G>
struct Piece {
  float* param;
  const G* grad;
  float* exp_avg;
  float* exp_avg_sq;
  bf16* copy;  // null: there is none
  int64_t size;
};

}  // namespace dist_llm::adamw

#define DL_ISA_SOURCE "adamw/adamw_rows.inc"
#include "common/foreach_isa.h"

namespace dist_llm {
namespace {

using adamw::Constants;
using adamw::Piece;

// Elements that one thread updates, or sums, at a time: also what one partial sum covers, so it depends on nothing else.
constexpr int64_t kPiece = 8192;
// Pieces a thread should have before another one is worth waking.
constexpr int64_t kGrain = 4;

void adamw_step_cpu(
    std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
    std::vector<Tensor> copies, const Tensor& grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay, double step) {
  const Constants constants = adamw::constants_of(lr, beta1, beta2, eps, weight_decay, step);
  if (params.empty()) return;
  adamw::check_lists({params, grads, exp_avgs, exp_avg_sqs, copies}, grad_scale);
  STD_TORCH_CHECK(
      copies.empty() || copies[0].scalar_type() == ScalarType::BFloat16, "adamw_step on CPU writes copies in bf16, not ",
      torch::headeronly::toString(copies[0].scalar_type()));
  const float scale = *in<float>(grad_scale);
  with_type(grads[0], "adamw_step", [&](auto s) {
    using G = decltype(s);
    std::vector<Piece<G>> pieces;
    for (size_t t = 0; t < params.size(); ++t) {
      const Piece<G> whole{out<float>(params[t]), in<G>(grads[t]), out<float>(exp_avgs[t]), out<float>(exp_avg_sqs[t]),
                           copies.empty() ? nullptr : out<bf16>(copies[t]), params[t].numel()};
      for (int64_t i = 0; i < whole.size; i += kPiece) {
        pieces.push_back({whole.param + i, whole.grad + i, whole.exp_avg + i, whole.exp_avg_sq + i,
                          whole.copy == nullptr ? nullptr : whole.copy + i, std::min(kPiece, whole.size - i)});
      }
    }
    torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) DL_PER_ISA(update<G>(constants, scale, pieces[static_cast<size_t>(i)]))
    });
  });
}

// Elements of one tensor whose squares are added into one number.
struct Part {
  const Tensor* tensor;
  int64_t begin;
};

Tensor sum_of_squares_cpu(std::vector<Tensor> tensors) {
  adamw::check_tensors(tensors);
  std::vector<Part> parts;
  for (const Tensor& t : tensors) {
    with_type(t, "sum_of_squares", [](auto) {});
    for (int64_t i = 0; i < t.numel(); i += kPiece) parts.push_back({&t, i});
  }
  std::vector<double> sums(parts.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part& part = parts[static_cast<size_t>(i)];
      double* sum = &sums[static_cast<size_t>(i)];
      const int64_t size = std::min(kPiece, part.tensor->numel() - part.begin);
      with_type(*part.tensor, "sum_of_squares", [&](auto s) {
        using S = decltype(s);
        DL_PER_ISA(squares<S>(in<S>(*part.tensor) + part.begin, size, sum))
      });
    }
  });
  Tensor result = torch::stable::new_empty(tensors[0], {}, ScalarType::Double);
  double total = 0.;
  for (double sum : sums) total += sum;
  *out<double>(result) = total;
  return result;
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("adamw_step", TORCH_BOX(&dist_llm::adamw_step_cpu));
  m.impl("sum_of_squares", TORCH_BOX(&dist_llm::sum_of_squares_cpu));
}
