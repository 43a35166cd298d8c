// Masks of dropout on CUDA: Philox 4x32-10 (Salmon et al., SC11) of single counters, and which of some neighbouring elements are kept.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dropout/dropout.h"

namespace dist_llm {

__device__ inline void philox(const dropout::Mask& mask, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t (&words)[4]) {
#pragma unroll
  for (int round = 0; round < dropout::kRounds; ++round) {
    const uint32_t high0 = __umulhi(dropout::kMultiplier0, c0), low0 = dropout::kMultiplier0 * c0;
    const uint32_t high1 = __umulhi(dropout::kMultiplier1, c2), low1 = dropout::kMultiplier1 * c2;
    c0 = high1 ^ c1 ^ mask.key0[round];
    c1 = low1;
    c2 = high0 ^ c3 ^ mask.key1[round];
    c3 = low0;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Which of the elements i to i + N of a row are kept: bit j for element i + j. Bits, not an array: an index that is known only at run
// time would put an array into local memory.
template <int N>
__device__ inline uint32_t keep_elements(const dropout::Mask& mask, int64_t row, int64_t i) {
  if (mask.drops_all) return 0;
  const uint64_t sample = static_cast<uint64_t>(mask.samples[row / mask.num_columns]);
  const uint32_t column = static_cast<uint32_t>(mask.columns[row % mask.num_columns]);
  const uint32_t low = static_cast<uint32_t>(sample), high = static_cast<uint32_t>(sample >> 32);
  const int64_t start = mask.skip + i;
  uint32_t words[4], bits = 0;
  if (N % dropout::kWords == 0 && start % dropout::kWords == 0) {
#pragma unroll
    for (int j = 0; j < N; j += dropout::kWords) {
      philox(mask, static_cast<uint32_t>(mask.first_counter + (start + j) / dropout::kWords), column, low, high, words);
#pragma unroll
      for (int k = 0; k < dropout::kWords; ++k) bits |= static_cast<uint32_t>(words[k] >= mask.threshold) << (j + k);
    }
    return bits;
  }
  // Elements that do not start at a counter, or single ones: a counter each.
#pragma unroll 1
  for (int j = 0; j < N; ++j) {
    philox(mask, static_cast<uint32_t>(mask.first_counter + (start + j) / dropout::kWords), column, low, high, words);
    const int k = static_cast<int>((start + j) % dropout::kWords);
    const uint32_t word = k == 0 ? words[0] : k == 1 ? words[1] : k == 2 ? words[2] : words[3];
    bits |= static_cast<uint32_t>(word >= mask.threshold) << j;
  }
  return bits;
}

}  // namespace dist_llm
