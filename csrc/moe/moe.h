// Mixture of experts: the choice of experts, and rows sorted by expert and brought back. The definitions are in
// dist_llm/kernels/moe/reference.py; the schemas are in native.py beside it. A slot is one choice of one token: t * k + j.
//
//   moe_route(logits, bias?, top_k, sigmoid, groups, groups_kept, normalize, scale) -> (weights, experts, probabilities, counts)
//       probabilities: softmax over all experts, or sigmoids. experts: the k best, by logit, or where there are a bias or groups by
//       probability + bias, in the groups_kept groups of neighbours whose two best add up to most. weights: their probabilities;
//       with normalize, softmax: the softmax over the chosen logits, sigmoid: divided by (their sum + 1e-20); times scale.
//   moe_route_backward(dweights?, dprobabilities?, weights, experts, probabilities, sigmoid, normalize, scale, dtype) -> dlogits
//   moe_permute(x, experts, num_experts) -> (rows, source, counts, offsets)
//       rows: x[source / k], sorted by expert, those of one expert in the order of their slots. Slots of expert -1 come last:
//       their rows are zeros and their source is -1.
//   moe_unpermute(rows, source, weights?, top_k) -> out
//       out[t] = sum over j of weights[t][j] * (the row whose source is t * k + j); without weights they are ones.
//   moe_unpermute_backward(dout, rows?, source, weights?, top_k) -> (drows, dweights)
//       drows = weights[source] * dout[source / k], zeros where source is -1; dweights = <dout[t], row of the slot>, 0 for a slot
//       that has no row; empty where there are no weights. rows are given if weights are.
//   moe_zero_rest_(rows, counts)
//       writes zeros into the rows from sum(counts) on; for a grouped product, which leaves them as they were.
//
// Shapes   logits, probabilities, dprobabilities, dlogits (T, E); bias, counts (E); offsets (E + 1); weights, dweights, experts
//          (T, k); x, out, dout (T, H); rows, drows (T k, H); source (T k). E, k, H >= 1.
// Dtypes   logits, dlogits, and x, rows, out and their gradients: fp32 or bf16 (CUDA: fp16 too), those of one call alike; bias,
//          weights, dweights, probabilities, dprobabilities fp32; experts, source, counts, offsets int32, so T k < 2^31.
// Memory   all arguments contiguous, on one device; every element of every result is written; no argument is changed but
//          the rows of moe_zero_rest_.
// Numbers  fp32 inside, rounded once; a tie goes to the lower number; a NaN counts as larger than all numbers. The same bits twice
//          and at any number of threads. An expert not in -1 .. E - 1, or a source not in -1 .. T k - 1, is an error on CPU; on CUDA,
//          where finding it would need a synchronisation, it counts as -1.
#pragma once

#include <optional>

#include "common/checks.h"

namespace dist_llm::moe {

// Added to the sum of the chosen sigmoids; as in reference.py.
constexpr float kSigmoidFloor = 1e-20f;

struct RouteShape {
  int64_t tokens;
  int64_t experts;
};

struct Options {
  int64_t top_k;
  bool sigmoid;
  int64_t groups;
  int64_t groups_kept;
  bool normalize;
  float scale;
};

inline void check_matrix(const Tensor& t, const char* name, const char* meaning) {
  STD_TORCH_CHECK(t.dim() == 2, name, " ", shape_of(t), " must be ", meaning);
  check_contiguous(t, name);
}

inline void check_dtype(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(
      t.scalar_type() == type, name, " is ", torch::headeronly::toString(t.scalar_type()), "; it must be ",
      torch::headeronly::toString(type));
}

inline RouteShape check_route(const Tensor& logits, const std::optional<Tensor>& bias, const Options& options) {
  check_matrix(logits, "logits", "(tokens, experts)");
  const int64_t experts = logits.size(1);
  STD_TORCH_CHECK(experts >= 1, "logits ", shape_of(logits), " must have at least one expert");
  STD_TORCH_CHECK(
      options.groups >= 1 && experts % options.groups == 0, "groups (", options.groups,
      ") must be at least 1 and divide the number of experts (", experts, ")");
  STD_TORCH_CHECK(
      options.groups_kept >= 1 && options.groups_kept <= options.groups, "groups_kept (", options.groups_kept,
      ") must be from 1 to groups (", options.groups, ")");
  const int64_t eligible = options.groups_kept * (experts / options.groups);
  STD_TORCH_CHECK(
      options.top_k >= 1 && options.top_k <= eligible, "top_k (", options.top_k,
      ") must be from 1 to the number of experts in the groups that are kept (", eligible, ")");
  STD_TORCH_CHECK(options.scale > 0.f, "scale (", options.scale, ") must be positive");
  STD_TORCH_CHECK(
      logits.size(0) * options.top_k <= INT32_MAX, "logits ", shape_of(logits), " with top_k ", options.top_k,
      " has more choices than an int32 counts");
  if (bias.has_value()) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == experts, "bias ", shape_of(*bias), " must have one number for each of the ", experts,
        " experts");
    check_dtype(*bias, ScalarType::Float, "bias");
    check_contiguous(*bias, "bias");
    check_same_device(*bias, logits, "bias", "logits");
  }
  return {logits.size(0), experts};
}

inline RouteShape check_route_backward(
    const std::optional<Tensor>& dweights, const std::optional<Tensor>& dprobabilities, const Tensor& weights, const Tensor& experts,
    const Tensor& probabilities) {
  check_matrix(probabilities, "probabilities", "(tokens, experts)");
  check_dtype(probabilities, ScalarType::Float, "probabilities");
  check_matrix(weights, "weights", "(tokens, top_k)");
  check_dtype(weights, ScalarType::Float, "weights");
  STD_TORCH_CHECK(
      weights.size(0) == probabilities.size(0) && weights.size(1) >= 1, "weights ", shape_of(weights), " must be (tokens, top_k), here (",
      probabilities.size(0), ", at least 1)");
  check_same_device(weights, probabilities, "weights", "probabilities");
  check_same_shape(experts, weights, "experts", "weights");
  check_dtype(experts, ScalarType::Int, "experts");
  check_contiguous(experts, "experts");
  check_same_device(experts, probabilities, "experts", "probabilities");
  if (dweights.has_value()) {
    check_same_shape(*dweights, weights, "dweights", "weights");
    check_dtype(*dweights, ScalarType::Float, "dweights");
    check_contiguous(*dweights, "dweights");
    check_same_device(*dweights, probabilities, "dweights", "probabilities");
  }
  if (dprobabilities.has_value()) {
    check_same_shape(*dprobabilities, probabilities, "dprobabilities", "probabilities");
    check_dtype(*dprobabilities, ScalarType::Float, "dprobabilities");
    check_contiguous(*dprobabilities, "dprobabilities");
    check_same_device(*dprobabilities, probabilities, "dprobabilities", "probabilities");
  }
  return {probabilities.size(0), probabilities.size(1)};
}

struct PermuteShape {
  int64_t tokens;
  int64_t top_k;
  int64_t width;
  int64_t slots() const { return tokens * top_k; }
};

inline PermuteShape check_permute(const Tensor& x, const Tensor& experts, int64_t num_experts) {
  check_matrix(x, "x", "(tokens, width)");
  check_matrix(experts, "experts", "(tokens, top_k)");
  STD_TORCH_CHECK(
      experts.size(0) == x.size(0) && experts.size(1) >= 1 && x.size(1) >= 1, "experts ", shape_of(experts),
      " must be (tokens, top_k) for x ", shape_of(x), ", none of top_k and the width 0");
  check_dtype(experts, ScalarType::Int, "experts");
  check_same_device(experts, x, "experts", "x");
  STD_TORCH_CHECK(num_experts >= 1, "num_experts (", num_experts, ") must be at least 1");
  STD_TORCH_CHECK(experts.numel() <= INT32_MAX, "experts ", shape_of(experts), " has more slots than an int32 counts");
  return {x.size(0), experts.size(1), x.size(1)};
}

// The checks of unpermute (t is rows) and of its gradient (t is dout, whose rows are tokens).
inline PermuteShape check_unpermute(
    const Tensor& t, const char* name, bool rows_are_slots, const Tensor& source, const std::optional<Tensor>& weights, int64_t top_k) {
  check_matrix(t, name, rows_are_slots ? "(tokens * top_k, width)" : "(tokens, width)");
  STD_TORCH_CHECK(t.size(1) >= 1, name, " ", shape_of(t), " must have a width of at least 1");
  STD_TORCH_CHECK(top_k >= 1, "top_k (", top_k, ") must be at least 1");
  STD_TORCH_CHECK(
      !rows_are_slots || t.size(0) % top_k == 0, "the number of ", name, " (", t.size(0), ") must be divisible by top_k (", top_k, ")");
  const int64_t tokens = rows_are_slots ? t.size(0) / top_k : t.size(0);
  STD_TORCH_CHECK(
      source.dim() == 1 && source.size(0) == tokens * top_k, "source ", shape_of(source), " must have one number for each of the ",
      tokens * top_k, " slots of ", name, " ", shape_of(t));
  STD_TORCH_CHECK(source.numel() <= INT32_MAX, "source ", shape_of(source), " has more slots than an int32 counts");
  check_dtype(source, ScalarType::Int, "source");
  check_contiguous(source, "source");
  check_same_device(source, t, "source", name);
  if (weights.has_value()) {
    STD_TORCH_CHECK(
        weights->dim() == 2 && weights->size(0) == tokens && weights->size(1) == top_k, "weights ", shape_of(*weights),
        " must be (tokens, top_k), here (", tokens, ", ", top_k, ")");
    check_dtype(*weights, ScalarType::Float, "weights");
    check_contiguous(*weights, "weights");
    check_same_device(*weights, t, "weights", name);
  }
  return {tokens, top_k, t.size(1)};
}

// rows of the backward of unpermute: given where weights are, and like drows.
inline void check_backward_rows(
    const std::optional<Tensor>& rows, const std::optional<Tensor>& weights, const Tensor& dout, const PermuteShape& shape) {
  STD_TORCH_CHECK(rows.has_value() == weights.has_value(), "rows and weights must be given together: a weight's gradient needs its row");
  if (!rows.has_value()) return;
  STD_TORCH_CHECK(
      rows->dim() == 2 && rows->size(0) == shape.slots() && rows->size(1) == shape.width, "rows ", shape_of(*rows), " must be (",
      shape.slots(), ", ", shape.width, ") for dout ", shape_of(dout));
  check_same_dtype(*rows, dout, "rows", "dout");
  check_contiguous(*rows, "rows");
  check_same_device(*rows, dout, "rows", "dout");
}

struct RestShape {
  int64_t rows;
  int64_t width;
};

inline RestShape check_zero_rest(const Tensor& rows, const Tensor& counts) {
  check_matrix(rows, "rows", "(rows, width)");
  STD_TORCH_CHECK(counts.dim() == 1, "counts ", shape_of(counts), " must be (groups)");
  check_dtype(counts, ScalarType::Int, "counts");
  check_contiguous(counts, "counts");
  check_same_device(counts, rows, "counts", "rows");
  return {rows.size(0), rows.size(1)};
}

}  // namespace dist_llm::moe
