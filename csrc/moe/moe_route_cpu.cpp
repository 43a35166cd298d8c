// The choice of experts on CPU, forward and backward; the contract is in moe.h, the row kernels in moe_route_rows.inc.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "common/softmax_vec.h"
#include "common/tensors.h"
#include "moe/find_vec.h"
#include "moe/moe.h"
#include "moe/stream.h"

namespace dist_llm {

template <class S>
struct RouteArgs {
  const S* logits;
  const float* bias;  // null: none
  float* weights;
  int32_t* chosen;
  float* probabilities;
  int64_t experts;
  int64_t padded;  // experts, rounded up to a multiple of every vector's width
  bool stream;     // probabilities go past the caches
  moe::Options options;
};

// Memory for one row, of one thread; x, score and choice have `padded` numbers, the others one for each group.
struct RouteScratch {
  float* x;
  float* score;
  float* choice;
  float* group_score;
  int32_t* is_kept;
};

template <class S>
struct RouteBackwardArgs {
  const float* dweights;        // null: none arrived
  const float* dprobabilities;  // null: none arrived
  const float* weights;
  const int32_t* chosen;
  const float* probabilities;
  S* dlogits;
  int64_t experts;
  int64_t top_k;
  bool sigmoid;
  bool normalize;
  float scale;
};

}  // namespace dist_llm

#define DL_ISA_SOURCE "moe/moe_route_rows.inc"
#include "common/foreach_isa.h"

namespace dist_llm {
namespace {

using moe::Options;
using moe::RouteShape;

// Elements a thread should have before another one is worth waking.
constexpr int64_t kGrain = 16384;
// Tokens whose choices are counted together, and at most so many such parts.
constexpr int64_t kTokensPerPart = 512;
constexpr int64_t kMaxParts = 64;
constexpr int64_t kWidest = 16;  // vector of any instruction set

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_route_cpu(
    const Tensor& logits, const std::optional<Tensor>& bias, int64_t top_k, bool sigmoid, int64_t groups, int64_t groups_kept,
    bool normalize, double scale) {
  const Options options{top_k, sigmoid, groups, groups_kept, normalize, static_cast<float>(scale)};
  const RouteShape shape = moe::check_route(logits, bias, options);
  Tensor weights = torch::stable::new_empty(logits, {shape.tokens, top_k}, ScalarType::Float);
  Tensor experts = torch::stable::new_empty(logits, {shape.tokens, top_k}, ScalarType::Int);
  Tensor probabilities = torch::stable::new_empty(logits, {shape.tokens, shape.experts}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(logits, {shape.experts}, ScalarType::Int);

  const int64_t tokens_per_part = std::max(kTokensPerPart, (shape.tokens + kMaxParts - 1) / kMaxParts);
  const int64_t parts = (shape.tokens + tokens_per_part - 1) / tokens_per_part;
  const int64_t padded = (shape.experts + kWidest - 1) / kWidest * kWidest;
  std::vector<int32_t> counts_of_parts(static_cast<size_t>(parts * shape.experts), 0);
  with_type(logits, "moe_route", [&](auto s) {
    using S = decltype(s);
    const RouteArgs<S> args{
        in<S>(logits), bias.has_value() ? in<float>(*bias) : nullptr, out<float>(weights), out<int32_t>(experts),
        out<float>(probabilities), shape.experts, padded,
        moe::is_streamed(out<float>(probabilities), shape.tokens, shape.experts), options};
    const int64_t grain = std::max<int64_t>(1, kGrain / (tokens_per_part * shape.experts));
    torch::stable::parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> numbers(static_cast<size_t>(3 * padded + groups));
      std::vector<int32_t> is_kept(static_cast<size_t>(groups));
      float* x = numbers.data();
      const RouteScratch scratch{x, x + padded, x + 2 * padded, x + 3 * padded, is_kept.data()};
      for (int64_t part = begin; part < end; ++part) {
        const int64_t first = part * tokens_per_part, last = std::min(first + tokens_per_part, shape.tokens);
        DL_PER_ISA(route<S>(args, scratch, counts_of_parts.data() + part * shape.experts, first, last))
      }
    });
  });
  int32_t* total = out<int32_t>(counts);
  std::fill_n(total, shape.experts, 0);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t e = 0; e < shape.experts; ++e) total[e] += counts_of_parts[part * shape.experts + e];
  }
  return {weights, experts, probabilities, counts};
}

Tensor moe_route_backward_cpu(
    const std::optional<Tensor>& dweights, const std::optional<Tensor>& dprobabilities, const Tensor& weights, const Tensor& experts,
    const Tensor& probabilities, bool sigmoid, bool normalize, double scale, ScalarType dtype) {
  const RouteShape shape = moe::check_route_backward(dweights, dprobabilities, weights, experts, probabilities);
  const int64_t top_k = weights.size(1);
  const int32_t* chosen = in<int32_t>(experts);
  for (int64_t i = 0; i < shape.tokens * top_k; ++i) {
    STD_TORCH_CHECK(chosen[i] >= 0 && chosen[i] < shape.experts, "expert ", chosen[i], " must be from 0 to ", shape.experts - 1);
  }
  Tensor dlogits = torch::stable::new_empty(probabilities, {shape.tokens, shape.experts}, dtype);
  with_type(dlogits, "moe_route", [&](auto s) {
    using S = decltype(s);
    const RouteBackwardArgs<S> args{
        dweights.has_value() ? in<float>(*dweights) : nullptr,
        dprobabilities.has_value() ? in<float>(*dprobabilities) : nullptr,
        in<float>(weights), chosen, in<float>(probabilities), out<S>(dlogits), shape.experts, top_k, sigmoid, normalize,
        static_cast<float>(scale)};
    torch::stable::parallel_for(0, shape.tokens, std::max<int64_t>(1, kGrain / shape.experts), [&](int64_t begin, int64_t end) {
      DL_PER_ISA(route_backward<S>(args, begin, end))
    });
  });
  return dlogits;
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&dist_llm::moe_route_cpu));
  m.impl("moe_route_backward", TORCH_BOX(&dist_llm::moe_route_backward_cpu));
}
