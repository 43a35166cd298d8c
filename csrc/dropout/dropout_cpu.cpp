// Dropout on CPU; the contract is in dropout.h, the mask in keep_vec.h, the row kernel in dropout_rows.inc.
#include "dropout/dropout.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/isa.h"
#include "common/tensors.h"
#include "dropout/keep_vec.h"

namespace dist_llm {

template <class S>
struct DropoutArgs {
  const S* x;
  const S* residual;  // null: nothing to add
  S* y;
  dropout::Mask mask;
  int64_t dim;
};

}  // namespace dist_llm

#define DL_ISA_SOURCE "dropout/dropout_rows.inc"
#include "common/foreach_isa.h"

namespace dist_llm {
namespace {

// Elements a thread should have before another one is worth waking.
constexpr int64_t kGrain = 16384;

Tensor run(const Tensor& x, const Tensor* residual, const dropout::Mask& mask) {
  check_contiguous(x, "x");
  Tensor y = torch::stable::empty_like(x);
  with_type(x, "dropout", [&](auto s) {
    using S = decltype(s);
    const int64_t dim = x.size(2);
    const DropoutArgs<S> args{in<S>(x), residual == nullptr ? nullptr : in<S>(*residual), out<S>(y), mask, dim};
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, dim));
    torch::stable::parallel_for(0, x.size(0) * x.size(1), grain, [&](int64_t begin, int64_t end) {
      DL_PER_ISA(apply_rows<S>(args, begin, end))
    });
  });
  return y;
}

Tensor dropout_cpu(
    const Tensor& x, double p, int64_t key0, int64_t key1, const Tensor& samples, const Tensor& columns, int64_t feature_start) {
  return run(x, nullptr, dropout::make_mask(x, p, key0, key1, samples, columns, feature_start));
}

Tensor dropout_add_cpu(
    const Tensor& x, const Tensor& residual, double p, int64_t key0, int64_t key1, const Tensor& samples, const Tensor& columns,
    int64_t feature_start) {
  dropout::check_residual(residual, x);
  return run(x, &residual, dropout::make_mask(x, p, key0, key1, samples, columns, feature_start));
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dist_llm::dropout_cpu));
  m.impl("dropout_add", TORCH_BOX(&dist_llm::dropout_add_cpu));
}
