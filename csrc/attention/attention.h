// Softmax attention without the matrix of scores (Dao et al., arXiv:2205.14135): out = softmax(rule(scale q k^T)) v over the keys each
// query sees. The definition is dist_llm/kernels/attention/reference.py; the schemas are in native.py beside it.
//
//   attention(q, k, v, doc_ids?, query_doc_ids?, alibi_slopes?, causal, window, scale, soft_cap, fp32_out) -> (out, lse)
//   attention_backward(dout, dlse?, q, k, v, out, lse, doc_ids?, query_doc_ids?, alibi_slopes?, causal, window, scale, soft_cap, fp32_out)
//     -> (dq, dk, dv)
//
// Shapes   q, out, dout, dq: (B, T, N, H); k, v, dk, dv: (B, S, K, H), K divides N, query head n reads key head n / (N / K);
//          H >= 1; lse, dlse: (B, N, T); doc_ids: (B, S) and query_doc_ids: (B, T), never falling along a row; alibi_slopes: (N).
// Dtypes   q, k, v, out, dout, dq, dk, dv all fp32 or all bf16 (CUDA: or all fp16, and H at most 256); lse, dlse, alibi_slopes fp32; doc_ids and query_doc_ids int32 or int64,
//          both the same. With fp32_out the results (out, or dq, dk, dv) are fp32 whatever q is: parts that are summed are rounded once.
// Memory   q, k, v, out, dout: any strides with neighbouring head dims, so that a slice of a cache or of a fused projection is not
//          copied; lse, dlse, doc_ids, query_doc_ids, alibi_slopes contiguous. Results are contiguous and written whole; no argument is changed.
// Keys     The queries are the last T of S tokens: query i is at position S - T + i. It sees keys of its own document, not behind its
//          position when causal, and nearer than `window` tokens when window > 0 (itself alone at window 1). More queries than keys
//          are defined only where positions play no part. With query_doc_ids queries and keys come from different places of a row and
//          a query sees the keys of its own document alone: no causal order, no window, no slopes, and any number of queries. A query that sees no key gets zeros and a log-sum-exp of -inf.
// Scores   s = scale q.k; s = soft_cap tanh(s / soft_cap) when soft_cap > 0; s -= alibi_slopes[n] |position - key|.
//          lse is the natural logarithm of the sum of exp(s); dlse is the gradient of the loss by it.
//          attention_backward takes out and lse as they are: given those of a whole row, its dq, dk, dv are what the keys at hand add
//          to the row's gradients (probabilities are exp(s - lse), whatever keys lse was summed over).
// Numbers  Scores, softmax and sums in fp32. Where the processor multiplies pairs of bf16, probabilities and the gradients of scores
//          are rounded to bf16 for their products. The same bits at any number of threads: work is divided by the shape alone.
#pragma once

#include <optional>

#include "common/checks.h"

namespace dist_llm::attention {

struct Shape {
  int64_t batch, num_queries, num_keys, heads, kv_heads, head_dim;
};

inline void check_rows(const Tensor& t, const Tensor& q, const char* name) {
  check_same_dtype(t, q, name, "q");
  check_same_device(t, q, name, "q");
  STD_TORCH_CHECK(
      t.size(3) == 1 || t.numel() == 0 || t.stride(3) == 1, name, " must have neighbouring head dims (stride ", t.stride(3),
      "); call .contiguous() on it first");
}

inline void check_documents(const Tensor& ids, const Tensor& q, int64_t batch, int64_t tokens, const char* name, const char* rule) {
  STD_TORCH_CHECK(
      ids.dim() == 2 && ids.size(0) == batch && ids.size(1) == tokens, name, " ", shape_of(ids), " must be ", rule, " = (", batch, ", ",
      tokens, ")");
  STD_TORCH_CHECK(
      ids.scalar_type() == ScalarType::Int || ids.scalar_type() == ScalarType::Long, name, " must be int32 or int64, not ",
      torch::headeronly::toString(ids.scalar_type()));
  check_contiguous(ids, name);
  check_same_device(ids, q, name, "q");
}

// The checks of all entry points.
inline Shape check_input(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& doc_ids,
    const std::optional<Tensor>& query_doc_ids, const std::optional<Tensor>& alibi_slopes, bool causal, int64_t window, double soft_cap) {
  STD_TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(0) == q.size(0) && k.size(3) == q.size(3),
      "attention takes q (B, T, N, H) and k, v (B, S, K, H), not ", shape_of(q), ", ", shape_of(k), ", ", shape_of(v));
  check_same_shape(v, k, "v", "k");
  const Shape shape{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3)};
  STD_TORCH_CHECK(
      shape.kv_heads >= 1 && shape.heads % shape.kv_heads == 0, "query heads (", shape.heads,
      ") must be a multiple of key and value heads (", shape.kv_heads, ")");
  STD_TORCH_CHECK(shape.head_dim >= 1, "head dim (", shape.head_dim, ") must be at least 1");
  STD_TORCH_CHECK(shape.num_keys < (1 << 24), "a row of ", shape.num_keys, " keys is too long; at most 16777215");
  STD_TORCH_CHECK(window >= 0, "window (", window, ") must be at least 1, or 0 for none");
  STD_TORCH_CHECK(soft_cap >= 0, "soft_cap (", soft_cap, ") must be positive, or 0 for none");
  const bool has_positions = causal || window > 0 || doc_ids.has_value() || alibi_slopes.has_value();
  STD_TORCH_CHECK(
      !has_positions || query_doc_ids.has_value() || shape.num_queries <= shape.num_keys, shape.num_queries, " queries are the last tokens of ", shape.num_keys,
      " keys: there cannot be more queries than keys");
  check_rows(q, q, "q");
  check_rows(k, q, "k");
  check_rows(v, q, "v");
  if (doc_ids.has_value()) check_documents(*doc_ids, q, shape.batch, shape.num_keys, "doc_ids", "(B, S), one for every key,");
  if (query_doc_ids.has_value()) {
    STD_TORCH_CHECK(doc_ids.has_value(), "query_doc_ids come with doc_ids, the documents of the keys");
    STD_TORCH_CHECK(
        !causal && window == 0 && !alibi_slopes.has_value(),
        "with query_doc_ids the queries have no place among the keys: causal, window and alibi_slopes mean nothing there");
    check_documents(*query_doc_ids, q, shape.batch, shape.num_queries, "query_doc_ids", "(B, T), one for every query,");
    check_same_dtype(*query_doc_ids, *doc_ids, "query_doc_ids", "doc_ids");
  }
  if (alibi_slopes.has_value()) {
    STD_TORCH_CHECK(
        alibi_slopes->dim() == 1 && alibi_slopes->size(0) == shape.heads && alibi_slopes->scalar_type() == ScalarType::Float,
        "alibi_slopes ", shape_of(*alibi_slopes), " must be fp32 with one slope for each of the ", shape.heads, " query heads");
    check_contiguous(*alibi_slopes, "alibi_slopes");
    check_same_device(*alibi_slopes, q, "alibi_slopes", "q");
  }
  return shape;
}

inline void check_stat(const Tensor& t, const Tensor& q, const Shape& shape, const char* name) {
  STD_TORCH_CHECK(
      t.dim() == 3 && t.size(0) == shape.batch && t.size(1) == shape.heads && t.size(2) == shape.num_queries &&
          t.scalar_type() == ScalarType::Float,
      name, " ", shape_of(t), " must be fp32 (B, N, T) = (", shape.batch, ", ", shape.heads, ", ", shape.num_queries, ")");
  check_contiguous(t, name);
  check_same_device(t, q, name, "q");
}

}  // namespace dist_llm::attention
