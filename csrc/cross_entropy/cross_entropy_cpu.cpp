// Cross-entropy on CPU; the contract is in cross_entropy.h, the row kernels in cross_entropy_rows.inc.
#include "cross_entropy/cross_entropy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/isa.h"
#include "common/softmax_vec.h"

namespace dist_llm::cross_entropy {

// Logits that are read for the maximum and again for the sum: 16 KiB, half of the smallest first-level cache.
template <class S>
constexpr int64_t block_of = 16384 / static_cast<int64_t>(sizeof(S));

// How far ahead of the sum memory is asked for: the next block and half of the one after it.
template <class S>
constexpr int64_t ahead_of = 3 * block_of<S> / 2;

// Numbers for which making a table costs less than it saves.
constexpr int64_t kWorthATable = 256;

struct RowStats {
  float max;
  double sum;  // of exp(x - max)
};

template <class S>
struct ForwardArgs {
  S* logits;  // written only when write_gradient
  const int64_t* targets;
  float* row_max;       // these four may be null: not wanted
  float* row_sum;
  float* target_logit;
  double* losses;
  int64_t vocab;
  int64_t vocab_start;
  int64_t ignore;
  double z_loss;
  bool write_gradient;
};

template <class S>
struct BackwardArgs {
  const S* logits;
  const int64_t* targets;
  const float* row_max;
  const float* row_sum;
  S* dlogits;
  float dloss;
  int64_t vocab;
  int64_t vocab_start;
  int64_t ignore;
  double z_loss;
  bool stream;  // the gradient is too large to be found in a cache when it is next read
};

// The column of a target among the columns at hand, or -1.
static inline int64_t column_of(int64_t target, int64_t vocab_start, int64_t vocab) {
  return target >= vocab_start && target - vocab_start < vocab ? target - vocab_start : -1;
}

}  // namespace dist_llm::cross_entropy

#define DL_ISA_SOURCE "cross_entropy/cross_entropy_rows.inc"
#include "common/foreach_isa.h"

namespace dist_llm {
namespace {

using cross_entropy::BackwardArgs;
using cross_entropy::ForwardArgs;
using cross_entropy::Shape;

// Logits a thread should have before another one is worth waking.
constexpr int64_t kGrain = 16384;
// From this size on, a gradient is written past the caches: it saves reading each line before it is overwritten.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* out(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f(S{}) with the storage type of the logits.
template <class F>
void with_type(const Tensor& logits, const F& f) {
  const ScalarType type = logits.scalar_type();
  if (type == ScalarType::Float) return f(float{});
  if (type == ScalarType::BFloat16) return f(bf16{});
  STD_TORCH_CHECK(false, "cross_entropy on CPU takes logits in fp32 or bf16, not ", torch::headeronly::toString(type));
}

void check_targets(const Tensor& targets, Shape shape, int64_t ignore) {
  const int64_t* t = in<int64_t>(targets);
  for (int64_t row = 0; row < shape.rows; ++row) {
    STD_TORCH_CHECK(
        t[row] == ignore || (t[row] >= 0 && t[row] < shape.vocab), "targets[", row, "] = ", t[row], " must be in [0, ", shape.vocab,
        "), or ", ignore, " to be ignored");
  }
}

// Where a forward pass leaves its results; null: not wanted.
struct Results {
  Tensor* row_max = nullptr;
  Tensor* row_sum = nullptr;
  Tensor* target_logit = nullptr;
  Tensor* loss = nullptr;
};

// `gradient`: the logits themselves when they are to be overwritten, or null.
void run_forward(
    const Tensor& logits, Tensor* gradient, const Tensor& targets, int64_t ignore, double z_loss, int64_t vocab_start, Shape shape,
    const Results& results) {
  std::optional<Tensor> losses;
  if (results.loss != nullptr) losses = torch::stable::new_empty(logits, {shape.rows}, ScalarType::Double);
  const auto row_floats = [](Tensor* t) { return t == nullptr ? nullptr : out<float>(*t); };
  with_type(logits, [&](auto s) {
    using S = decltype(s);
    const ForwardArgs<S> args{
        gradient == nullptr ? const_cast<S*>(in<S>(logits)) : out<S>(*gradient),
        in<int64_t>(targets),
        row_floats(results.row_max),
        row_floats(results.row_sum),
        row_floats(results.target_logit),
        losses.has_value() ? out<double>(*losses) : nullptr,
        shape.vocab,
        vocab_start,
        ignore,
        z_loss,
        gradient != nullptr};
    const int64_t grain = std::max<int64_t>(1, kGrain / shape.vocab);
    torch::stable::parallel_for(0, shape.rows, grain, [&](int64_t begin, int64_t end) { DL_PER_ISA(forward<S>(args, begin, end)) });
  });
  if (results.loss != nullptr) {
    double sum = 0.;
    const double* of_row = in<double>(*losses);
    for (int64_t row = 0; row < shape.rows; ++row) sum += of_row[row];
    *out<float>(*results.loss) = static_cast<float>(sum);
  }
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cpu(const Tensor& logits, const Tensor& targets, int64_t ignore, double z_loss) {
  const Shape shape = cross_entropy::check_input(logits, targets);
  check_targets(targets, shape, ignore);
  Tensor loss = torch::stable::new_empty(logits, {}, ScalarType::Float);
  Tensor row_max = cross_entropy::new_per_row(logits);
  Tensor row_sum = cross_entropy::new_per_row(logits);
  run_forward(
      logits, nullptr, targets, ignore, z_loss, 0, shape, {.row_max = &row_max, .row_sum = &row_sum, .loss = &loss});
  return {loss, row_max, row_sum};
}

Tensor cross_entropy_grad_cpu(Tensor logits, const Tensor& targets, int64_t ignore, double z_loss) {
  const Shape shape = cross_entropy::check_input(logits, targets);
  check_targets(targets, shape, ignore);
  Tensor loss = torch::stable::new_empty(logits, {}, ScalarType::Float);
  run_forward(logits, &logits, targets, ignore, z_loss, 0, shape, {.loss = &loss});
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_partials_cpu(
    const Tensor& logits, const Tensor& targets, int64_t ignore, int64_t vocab_start) {
  const Shape shape = cross_entropy::check_input(logits, targets);
  Tensor row_max = cross_entropy::new_per_row(logits);
  Tensor row_sum = cross_entropy::new_per_row(logits);
  Tensor target_logit = cross_entropy::new_per_row(logits);
  run_forward(
      logits, nullptr, targets, ignore, 0., vocab_start, shape,
      {.row_max = &row_max, .row_sum = &row_sum, .target_logit = &target_logit});
  return {row_max, row_sum, target_logit};
}

Tensor cross_entropy_backward_cpu(
    const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& row_max, const Tensor& row_sum, int64_t ignore,
    double z_loss, int64_t vocab_start) {
  const Shape shape = cross_entropy::check_input(logits, targets);
  cross_entropy::check_per_row(row_max, logits, "row_max");
  cross_entropy::check_per_row(row_sum, logits, "row_sum");
  cross_entropy::check_dloss(dloss, logits);
  Tensor dlogits = torch::stable::empty_like(logits);
  with_type(logits, [&](auto s) {
    using S = decltype(s);
    const BackwardArgs<S> args{
        in<S>(logits),
        in<int64_t>(targets),
        in<float>(row_max),
        in<float>(row_sum),
        out<S>(dlogits),
        *in<float>(dloss),
        shape.vocab,
        vocab_start,
        ignore,
        z_loss,
        shape.rows * shape.vocab * static_cast<int64_t>(sizeof(S)) >= kStreamBytes};
    const int64_t grain = std::max<int64_t>(1, kGrain / shape.vocab);
    torch::stable::parallel_for(0, shape.rows, grain, [&](int64_t begin, int64_t end) { DL_PER_ISA(backward<S>(args, begin, end)) });
  });
  return dlogits;
}

void cross_entropy_add_cpu(Tensor total, const Tensor& part) {
  check_same_shape(part, total, "part", "total");
  STD_TORCH_CHECK(
      total.scalar_type() == ScalarType::Float, "total must be fp32, not ", torch::headeronly::toString(total.scalar_type()));
  check_contiguous(total, "total");
  check_contiguous(part, "part");
  float* sum = out<float>(total);
  with_type(part, [&](auto s) {
    using S = decltype(s);
    const S* x = in<S>(part);
    torch::stable::parallel_for(0, total.numel(), kGrain, [&](int64_t begin, int64_t end) { DL_PER_ISA(add_to<S>(sum, x, begin, end)) });
  });
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&dist_llm::cross_entropy_cpu));
  m.impl("cross_entropy_grad_", TORCH_BOX(&dist_llm::cross_entropy_grad_cpu));
  m.impl("cross_entropy_add_", TORCH_BOX(&dist_llm::cross_entropy_add_cpu));
  m.impl("cross_entropy_partials", TORCH_BOX(&dist_llm::cross_entropy_partials_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&dist_llm::cross_entropy_backward_cpu));
}
