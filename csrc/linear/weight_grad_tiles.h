// The parts of linear_weight_grad that compute, for AVX-512 with products of bf16 pairs.
//
// A product of bf16 pairs adds a[2p] b[2p] + a[2p+1] b[2p+1] to each of 16 sums, so both matrices are packed by pairs of rows: word (p, n) of
// dy is (dy[2p, n], dy[2p+1, n]), of x likewise. Of dy one word at a time is broadcast, of x three vectors are loaded: 24 sums of 16 in registers, 24
// products for 11 loads. The blocks: kBlockRows rows of kBlockInputs columns of x stay in the second-level cache while all columns of dy pass by.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "common/vec.h"

namespace dist_llm::linear {

#define DL_BF16_PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))

constexpr int64_t kTileOutputs = 8, kTileVectors = 3, kTileInputs = 16 * kTileVectors, kTileSums = kTileOutputs * kTileInputs;
constexpr int64_t kStripOutputs = 32;  // columns of dy packed at a time: a cache line of each row
constexpr int64_t kStripTiles = kStripOutputs / kTileOutputs;
constexpr int64_t kBlockRows = 1024, kBlockInputs = 8 * kTileInputs;  // 768 KiB of x

// The first n of 32 bf16 numbers, or of 16.
DL_BF16_PAIRS static inline __mmask32 first32(int64_t n) { return n >= 32 ? ~__mmask32{0} : n <= 0 ? 0 : (__mmask32{1} << n) - 1; }
DL_BF16_PAIRS static inline __mmask16 first16(int64_t n) { return static_cast<__mmask16>(first32(n < 16 ? n : 16)); }

// 32 columns of two rows, as two vectors of 16 words (even row, odd row) in the order of the columns. odd may be null: zeros.
struct Words {
  __m512i low, high;
};

DL_BF16_PAIRS static inline Words interleave(const bf16* even, const bf16* odd, __mmask32 there) {
  const __m512i low = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i a = _mm512_maskz_loadu_epi16(there, even);
  const __m512i b = odd == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(there, odd);
  return {_mm512_permutex2var_epi16(a, low, b), _mm512_permutex2var_epi16(a, high, b)};
}

// Columns [0, columns) of pairs [begin, end) of a block of rows of x, padded with zeros to whole panels: words[panel][pair][kTileInputs].
DL_BF16_PAIRS static inline void pack_inputs(
    const bf16* x, int64_t stride, int64_t rows, int64_t columns, int64_t begin, int64_t end, int64_t pairs, uint32_t* words) {
  const int64_t vectors = (columns + kTileInputs - 1) / kTileInputs * kTileVectors;
  for (int64_t p = begin; p < end; ++p) {
    const bf16* even = x + 2 * p * stride;
    const bf16* odd = 2 * p + 1 < rows ? even + stride : nullptr;
    for (int64_t v = 0; v < vectors; v += 2) {
      const int64_t column = 16 * v;
      const Words both = interleave(even + column, odd == nullptr ? nullptr : odd + column, first32(columns - column));
      uint32_t* to = words + (v / kTileVectors * pairs + p) * kTileInputs + v % kTileVectors * 16;
      _mm512_store_si512(to, both.low);
      if (v + 1 == vectors) break;
      to = words + ((v + 1) / kTileVectors * pairs + p) * kTileInputs + (v + 1) % kTileVectors * 16;
      _mm512_store_si512(to, both.high);
    }
  }
}

// Columns [0, columns <= kStripOutputs) of a block of rows of dy: words[tile][pair][kTileOutputs]. Their sums are added to sums, unless it is null.
DL_BF16_PAIRS static inline void pack_outputs(
    const bf16* dy, int64_t stride, int64_t rows, int64_t columns, int64_t pairs, uint32_t* words, float* sums) {
  const __mmask32 there = first32(columns);
  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    const bf16* even = dy + 2 * p * stride;
    const Words both = interleave(even, 2 * p + 1 < rows ? even + stride : nullptr, there);
    uint32_t* to = words + p * kTileOutputs;
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(both.low));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + pairs * kTileOutputs), _mm512_extracti64x4_epi64(both.low, 1));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + 2 * pairs * kTileOutputs), _mm512_castsi512_si256(both.high));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + 3 * pairs * kTileOutputs), _mm512_extracti64x4_epi64(both.high, 1));
    low = _mm512_dpbf16_ps(low, (__m512bh)both.low, ones);
    high = _mm512_dpbf16_ps(high, (__m512bh)both.high, ones);
  }
  if (sums == nullptr) return;
  const __mmask16 first = first16(columns), second = first16(columns - 16);
  _mm512_mask_storeu_ps(sums, first, _mm512_add_ps(low, _mm512_maskz_loadu_ps(first, sums)));
  _mm512_mask_storeu_ps(sums + 16, second, _mm512_add_ps(high, _mm512_maskz_loadu_ps(second, sums + 16)));
}

// kTileOutputs x kTileInputs sums over pairs of rows, added to those in sums unless this is the first block of rows. Of the last block they
// go, rounded, to the result: outputs x inputs of them, which may be fewer than a tile.
DL_BF16_PAIRS static inline void multiply_tile(
    const uint32_t* dy, const uint32_t* x, int64_t pairs, bool first, bool last, float* sums, bf16* dweight, int64_t stride,
    int64_t outputs, int64_t inputs) {
  __m512 acc[kTileOutputs][kTileVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileOutputs; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < kTileVectors; ++j) acc[i][j] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i * kTileInputs + 16 * j);
  }
  for (int64_t p = 0; p < pairs; ++p) {
    const __m512bh x0 = (__m512bh)_mm512_load_si512(x), x1 = (__m512bh)_mm512_load_si512(x + 16),
                   x2 = (__m512bh)_mm512_load_si512(x + 32);
#pragma GCC unroll 8
    for (int i = 0; i < kTileOutputs; ++i) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(dy[i]));
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], x0, a);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], x1, a);
      acc[i][2] = _mm512_dpbf16_ps(acc[i][2], x2, a);
    }
    dy += kTileOutputs;
    x += kTileInputs;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileOutputs; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < kTileVectors; ++j) {
      if (!last) {
        _mm512_storeu_ps(sums + i * kTileInputs + 16 * j, acc[i][j]);
      } else if (i < outputs && 16 * j < inputs) {
        _mm256_mask_storeu_epi16(dweight + i * stride + 16 * j, first16(inputs - 16 * j), (__m256i)_mm512_cvtneps_pbh(acc[i][j]));
      }
    }
  }
}

// Sums of dy over all rows, rounded.
DL_BF16_PAIRS static inline void round_sums(const float* sums, int64_t n, bf16* dbias) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 there = first16(n - i);
    _mm256_mask_storeu_epi16(dbias + i, there, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, sums + i)));
  }
}

#undef DL_BF16_PAIRS

}  // namespace dist_llm::linear
#endif
