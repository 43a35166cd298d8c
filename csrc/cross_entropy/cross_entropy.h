// Softmax cross-entropy over rows of logits, summed over the rows whose target is not `ignore`:
//
//   nll = lse - logits[target], lse = log(sum over the row of exp(logits)), loss = sum of nll + z_loss * lse^2
//
// (the z-loss of PaLM, arXiv:2204.02311, section 5). The definition is dist_llm/kernels/cross_entropy/reference.py; the schemas
// are in native.py beside it.
//
//   cross_entropy(logits, targets, ignore, z_loss) -> (loss, row_max, row_sum)
//   cross_entropy_backward(dloss, logits, targets, row_max, row_sum, ignore, z_loss, vocab_start) -> dlogits
//   cross_entropy_grad_(logits!, targets, ignore, z_loss) -> loss         writes the gradient for dloss = 1 over the logits
//   cross_entropy_partials(logits, targets, ignore, vocab_start) -> (row_max, row_sum, target_logit)
//   cross_entropy_add_(total!, part) -> ()                                total += part, any shape; CPU only, for linear_cross_entropy
//
// row_max is the largest logit of a row and row_sum the sum of exp(logits - row_max): together they are lse without the digits that
// adding them would cost. For a vocabulary divided over ranks, where logits are the columns from vocab_start on, partials are
// combined by the caller, and backward takes the combined row_max and row_sum.
//
// Shapes   logits, dlogits: (N, V), V >= 1; targets: (N); row_max, row_sum, target_logit: (N); loss, dloss: ().
// Dtypes   logits fp32 or bf16 (CUDA: fp16 too), dlogits and part as logits; targets int64; everything else fp32. A row is computed in fp32 and its sum kept
//          in fp64; the loss is added up in fp64.
// Targets  `ignore`, or in [0, V): another one is an error. With vocab_start, a target outside the columns at hand belongs to another rank:
//          target_logit is 0 and nothing is subtracted from the gradient.
// Ignored  rows are not read, have row_max 0, row_sum 1, target_logit 0 and a gradient of zeros.
// Memory   all arguments contiguous, on one device; every element of every result is written; only logits of cross_entropy_grad_ and total change.
// Numbers  the same bits at any number of threads: a row is computed by one thread, the loss is added in the order of the rows.
#pragma once

#include "common/checks.h"

namespace dist_llm::cross_entropy {

struct Shape {
  int64_t rows;
  int64_t vocab;
};

// The checks of all entry points on logits and targets.
inline Shape check_input(const Tensor& logits, const Tensor& targets) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1, "logits ", shape_of(logits), " must be (N, V) with V at least 1");
  STD_TORCH_CHECK(
      targets.dim() == 1 && targets.size(0) == logits.size(0), "targets ", shape_of(targets), " must have one number for each row of logits ",
      shape_of(logits));
  STD_TORCH_CHECK(
      targets.scalar_type() == ScalarType::Long, "targets must be int64, not ", torch::headeronly::toString(targets.scalar_type()));
  check_contiguous(logits, "logits");
  check_contiguous(targets, "targets");
  check_same_device(targets, logits, "targets", "logits");
  return {logits.size(0), logits.size(1)};
}

// One fp32 number for each row.
inline void check_per_row(const Tensor& t, const Tensor& logits, const char* name) {
  STD_TORCH_CHECK(
      t.dim() == 1 && t.size(0) == logits.size(0) && t.scalar_type() == ScalarType::Float, name, " ", shape_of(t),
      " must be fp32 with one number for each row of logits ", shape_of(logits));
  check_contiguous(t, name);
  check_same_device(t, logits, name, "logits");
}

inline void check_dloss(const Tensor& dloss, const Tensor& logits) {
  STD_TORCH_CHECK(
      dloss.numel() == 1 && dloss.scalar_type() == ScalarType::Float, "dloss ", shape_of(dloss), " must be one fp32 number");
  check_same_device(dloss, logits, "dloss", "logits");
}

inline Tensor new_per_row(const Tensor& logits) {
  return torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Float);
}

}  // namespace dist_llm::cross_entropy
