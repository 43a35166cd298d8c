// Dropout whose mask is a function of the seed, the site, the sample, the token's column and the feature. The definition is
// dist_llm/kernels/dropout/reference.py; the schemas are in native.py beside it.
//
//   dropout(x, p, key0, key1, samples, columns, feature_start) -> y                  y = kept ? x / (1 - p) : 0
//   dropout_add(x, residual, p, key0, key1, samples, columns, feature_start) -> y    y = residual + (kept ? x / (1 - p) : 0)
// Backward of both is dropout of the gradient: the mask is made again.
//
// Shapes   x, residual, y: (B, T, D); samples: (B); columns: (T). p in [0, 1); key0, key1: the key of seed and site, in [0, 2^32).
// Dtypes   x fp32 or bf16 (CUDA: fp16 too); residual and y as x; samples and columns int64. Computed in fp32 and rounded once, to even.
// Memory   all arguments contiguous, on one device; every element of y is written; no argument is changed.
// Mask     the number of feature f of column t of sample s is word f % 4 of Philox 4x32-10 (Salmon et al., SC11) at the counter
//          (f / 4, t, s mod 2^32, s / 2^32); the element is kept where it is at least round(p 2^32). The same bits as the reference.
#pragma once

#include "common/checks.h"

#include <cmath>
#include <cstdint>

namespace dist_llm::dropout {

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;  // what the key grows by each round
constexpr int kRounds = 10;
constexpr int kWords = 4;  // neighbouring features that share a counter

// What all elements of a call share.
struct Mask {
  uint32_t key0[kRounds], key1[kRounds];
  uint32_t threshold;  // a number below it drops its element
  bool drops_all;      // the threshold is 2^32
  float scale;
  const int64_t* samples;
  const int64_t* columns;
  int64_t num_columns;
  int64_t first_counter;
  int skip;  // features of the first counter that come before x
};

inline void check_positions(const Tensor& t, const Tensor& x, int64_t dim, const char* name) {
  STD_TORCH_CHECK(
      t.dim() == 1 && t.size(0) == x.size(dim) && t.scalar_type() == ScalarType::Long, name, " ", shape_of(t),
      " must be int64 with one number for each of the ", x.size(dim), " indices of dimension ", dim, " of x ", shape_of(x));
  check_contiguous(t, name);
  check_same_device(t, x, name, "x");
}

inline void check_residual(const Tensor& residual, const Tensor& x) {
  check_same_shape(residual, x, "residual", "x");
  check_same_dtype(residual, x, "residual", "x");
  check_contiguous(residual, "residual");
  check_same_device(residual, x, "residual", "x");
}

// Checks the arguments that say what is dropped, and puts them together.
inline Mask make_mask(
    const Tensor& x, double p, int64_t key0, int64_t key1, const Tensor& samples, const Tensor& columns, int64_t feature_start) {
  STD_TORCH_CHECK(x.dim() == 3, "dropout needs x (B, T, D), not ", shape_of(x));
  STD_TORCH_CHECK(p >= 0. && p < 1., "dropout probability must be in [0, 1), it is ", p);
  constexpr int64_t limit = int64_t{1} << 32;
  STD_TORCH_CHECK(key0 >= 0 && key0 < limit && key1 >= 0 && key1 < limit, "keys must be in [0, 2^32), they are ", key0, " and ", key1);
  STD_TORCH_CHECK(
      feature_start >= 0 && (feature_start + x.size(2)) / kWords < limit, "feature_start must be at least 0 and below 2^34, it is ",
      feature_start);
  check_positions(samples, x, 0, "samples");
  check_positions(columns, x, 1, "columns");
  Mask mask;
  for (int round = 0; round < kRounds; ++round) {
    mask.key0[round] = static_cast<uint32_t>(key0) + static_cast<uint32_t>(round) * kWeyl0;
    mask.key1[round] = static_cast<uint32_t>(key1) + static_cast<uint32_t>(round) * kWeyl1;
  }
  const double threshold = std::nearbyint(p * 4294967296.);
  mask.drops_all = threshold >= 4294967296.;
  mask.threshold = mask.drops_all ? 0xffffffffu : static_cast<uint32_t>(threshold);
  mask.scale = static_cast<float>(1. / (1. - p));
  mask.samples = static_cast<const int64_t*>(samples.const_data_ptr());
  mask.columns = static_cast<const int64_t*>(columns.const_data_ptr());
  mask.num_columns = x.size(1);
  mask.first_counter = feature_start / kWords;
  mask.skip = static_cast<int>(feature_start % kWords);
  return mask;
}

}  // namespace dist_llm::dropout
