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

// 32 columns of two rows, as two vectors of 16 words (even row, odd row) in the order of the columns.
struct Words {
  __m512i low, high;
};

DL_BF16_PAIRS static inline Words interleave(__m512i even, __m512i odd) {
  const __m512i low = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  return {_mm512_permutex2var_epi16(even, low, odd), _mm512_permutex2var_epi16(even, high, odd)};
}

// The same of rows in memory. The columns that are there are read, and odd only where there is one; the rest are zeros.
DL_BF16_PAIRS static inline Words read_words(const bf16* even, bool has_odd, int64_t stride, __mmask32 there) {
  return interleave(
      _mm512_maskz_loadu_epi16(there, even), _mm512_maskz_loadu_epi16(has_odd ? there : __mmask32{0}, has_odd ? even + stride : even));
}

DL_BF16_PAIRS static inline Words read_words(const bf16* even, int64_t stride) {
  return interleave(_mm512_loadu_si512(even), _mm512_loadu_si512(even + stride));
}

// Columns [0, columns) of pairs [begin, end) of a block of rows of x, padded with zeros to whole panels: words[panel][pair][kTileInputs].
DL_BF16_PAIRS static inline void pack_inputs(
    const bf16* x, int64_t stride, int64_t rows, int64_t columns, int64_t begin, int64_t end, int64_t pairs, uint32_t* words) {
  const int64_t panels = (columns + kTileInputs - 1) / kTileInputs, panel_words = pairs * kTileInputs;
  for (int64_t p = begin; p < end; ++p) {
    const bf16* even = x + 2 * p * stride;
    const bool has_odd = 2 * p + 1 < rows;
    // Two panels are three times 32 columns.
    for (int64_t panel = 0; panel < panels; panel += 2) {
      const int64_t column = panel * kTileInputs;
      uint32_t* to = words + panel * panel_words + p * kTileInputs;
      Words a, b, c;
      if (has_odd && columns - column >= 96) {
        a = read_words(even + column, stride);
        b = read_words(even + column + 32, stride);
        c = read_words(even + column + 64, stride);
      } else {
        a = read_words(even + column, has_odd, stride, first32(columns - column));
        b = read_words(even + column + 32, has_odd, stride, first32(columns - column - 32));
        c = read_words(even + column + 64, has_odd, stride, first32(columns - column - 64));
      }
      _mm512_store_si512(to, a.low);
      _mm512_store_si512(to + 16, a.high);
      _mm512_store_si512(to + 32, b.low);
      if (panel + 1 == panels) break;
      to += panel_words;
      _mm512_store_si512(to, b.high);
      _mm512_store_si512(to + 16, c.low);
      _mm512_store_si512(to + 32, c.high);
    }
  }
}

// A pair of rows of 32 columns of dy, four tiles apart by tile_words; its sums added to low and high.
DL_BF16_PAIRS static inline void store_outputs(const Words& both, int64_t tile_words, uint32_t* to, __m512* low, __m512* high) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(both.low));
  _mm256_store_si256(reinterpret_cast<__m256i*>(to + tile_words), _mm512_extracti64x4_epi64(both.low, 1));
  _mm256_store_si256(reinterpret_cast<__m256i*>(to + 2 * tile_words), _mm512_castsi512_si256(both.high));
  _mm256_store_si256(reinterpret_cast<__m256i*>(to + 3 * tile_words), _mm512_extracti64x4_epi64(both.high, 1));
  *low = _mm512_dpbf16_ps(*low, (__m512bh)both.low, ones);
  *high = _mm512_dpbf16_ps(*high, (__m512bh)both.high, ones);
}

// Columns [0, columns <= kStripOutputs) of a block of rows of dy: words[tile][pair][kTileOutputs]. Their sums are added to sums, unless it is null.
DL_BF16_PAIRS static inline void pack_outputs(
    const bf16* dy, int64_t stride, int64_t rows, int64_t columns, int64_t pairs, uint32_t* words, float* sums) {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  const int64_t whole = columns == kStripOutputs ? rows / 2 : 0, tile_words = pairs * kTileOutputs;
  for (int64_t p = 0; p < whole; ++p) {
    store_outputs(read_words(dy + 2 * p * stride, stride), tile_words, words + p * kTileOutputs, &low, &high);
  }
  for (int64_t p = whole; p < pairs; ++p) {
    const Words both = read_words(dy + 2 * p * stride, 2 * p + 1 < rows, stride, first32(columns));
    store_outputs(both, tile_words, words + p * kTileOutputs, &low, &high);
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
