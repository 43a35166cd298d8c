// Masks of dropout on CPU: bits made by vectorised Philox, and loads and stores that leave out what they drop.
//
// KeepVec<V> has for the vector type V:
//   fill(mask, row, first, words, bits)   bits[j], bit i: the element at feature 32 j + i of those from counter `first` on is kept
//   load_pair(p, n, bits, a, b)           SoftmaxVec<V>::load_pair of the first n <= pair_width elements, those without a bit as 0
//   store_pair(p, n, bits, a, b)          the inverse; elements without a bit are stored as 0. Rounds to nearest even
// Bits are in the order of memory, whatever order load_pair puts elements into.
//
// Philox multiplies 32-bit numbers to 64-bit ones: each word of a counter is in the lower half of a 64-bit lane of its own. The upper
// half holds rubbish, which the next multiplication does not see. Rounds 1 and 2 are shorter: what does not depend on the feature is
// computed once a row.
#pragma once

#include "common/softmax_vec.h"
#include "dropout/dropout.h"

namespace dist_llm {

// The first two rounds of one row, as far as they do not depend on the feature, and D, what the third adds.
struct KeepRow {
  uint32_t a, b, c, d;
};

inline KeepRow keep_row(const dropout::Mask& mask, int64_t row) {
  const uint64_t sample = static_cast<uint64_t>(mask.samples[row / mask.num_columns]);
  const uint32_t column = static_cast<uint32_t>(mask.columns[row % mask.num_columns]);
  const uint64_t second = uint64_t{dropout::kMultiplier1} * static_cast<uint32_t>(sample);
  const uint32_t word0 = static_cast<uint32_t>(second >> 32) ^ column ^ mask.key0[0];
  const uint64_t first = uint64_t{dropout::kMultiplier0} * word0;
  return {
      static_cast<uint32_t>(sample >> 32) ^ mask.key1[0], static_cast<uint32_t>(second) ^ mask.key0[1],
      static_cast<uint32_t>(first >> 32) ^ mask.key1[1], static_cast<uint32_t>(first) ^ mask.key1[2]};
}

template <class V>
struct KeepVec;

template <>
struct KeepVec<VecGeneric> {
  using type = VecGeneric::type;
  static constexpr int lanes = 8;

  static void fill(const dropout::Mask& mask, const KeepRow& row, int64_t first, int64_t words, uint32_t* bits) {
    for (int64_t j = 0; j < words; ++j) {
      uint32_t w0[lanes], w1[lanes], w2[lanes], w3[lanes];
      for (int i = 0; i < lanes; ++i) {
        const uint64_t p0 = uint64_t{dropout::kMultiplier0} * static_cast<uint32_t>(first + j * lanes + i);
        const uint64_t p1 = uint64_t{dropout::kMultiplier1} * (static_cast<uint32_t>(p0 >> 32) ^ row.a);
        const uint64_t q0 = uint64_t{dropout::kMultiplier0} * (static_cast<uint32_t>(p1 >> 32) ^ row.b);
        const uint64_t q1 = uint64_t{dropout::kMultiplier1} * (static_cast<uint32_t>(p0) ^ row.c);
        w0[i] = static_cast<uint32_t>(q1 >> 32) ^ static_cast<uint32_t>(p1) ^ mask.key0[2];
        w1[i] = static_cast<uint32_t>(q1);
        w2[i] = static_cast<uint32_t>(q0 >> 32) ^ row.d;
        w3[i] = static_cast<uint32_t>(q0);
      }
      for (int round = 3; round < dropout::kRounds; ++round) {
        for (int i = 0; i < lanes; ++i) {
          const uint64_t p0 = uint64_t{dropout::kMultiplier0} * w0[i];
          const uint64_t p1 = uint64_t{dropout::kMultiplier1} * w2[i];
          w0[i] = static_cast<uint32_t>(p1 >> 32) ^ w1[i] ^ mask.key0[round];
          w1[i] = static_cast<uint32_t>(p1);
          w2[i] = static_cast<uint32_t>(p0 >> 32) ^ w3[i] ^ mask.key1[round];
          w3[i] = static_cast<uint32_t>(p0);
        }
      }
      uint32_t word = 0;
      for (int i = 0; i < lanes; ++i) {
        word |= static_cast<uint32_t>(w0[i] >= mask.threshold) << (4 * i) | static_cast<uint32_t>(w1[i] >= mask.threshold) << (4 * i + 1) |
                static_cast<uint32_t>(w2[i] >= mask.threshold) << (4 * i + 2) |
                static_cast<uint32_t>(w3[i] >= mask.threshold) << (4 * i + 3);
      }
      bits[j] = word;
    }
  }
  template <class S>
  static void load_pair(const S* p, int n, uint32_t bits, type& a, type& b) {
    for (int i = 0; i < 8; ++i) a.at[i] = i < n && (bits >> i & 1u) != 0 ? to_float(p[i]) : 0.f;
    for (int i = 0; i < 8; ++i) b.at[i] = i + 8 < n && (bits >> (i + 8) & 1u) != 0 ? to_float(p[i + 8]) : 0.f;
  }
  template <class S>
  static void store_pair(S* p, int n, uint32_t bits, const type& a, const type& b) {
    for (int i = 0; i < 8 && i < n; ++i) from_float((bits >> i & 1u) != 0 ? a.at[i] : 0.f, p + i);
    for (int i = 8; i < n; ++i) from_float((bits >> i & 1u) != 0 ? b.at[i - 8] : 0.f, p + i);
  }
};

#if defined(__x86_64__)

#define DL_AVX2 __attribute__((target("avx2,fma"), always_inline)) static inline
template <>
struct KeepVec<VecAvx2> {
  using type = __m256;
  static constexpr int pair_width = 16;

  DL_AVX2 void fill(const dropout::Mask& mask, const KeepRow& row, int64_t first, int64_t words, uint32_t* bits) {
    const Constants constants = constants_of(mask, row);
    __m256i counter = _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_set_epi64x(3, 2, 1, 0));
    for (int64_t j = 0; j < words; ++j) {
      const __m256i low = keep16(constants, counter);
      const __m256i high = keep16(constants, _mm256_add_epi64(counter, _mm256_set1_epi64x(4)));
      counter = _mm256_add_epi64(counter, _mm256_set1_epi64x(8));
      // packs works inside each 128-bit lane; the permutation restores the order.
      const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
      bits[j] = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
    }
  }
  DL_AVX2 void load_pair(const float* p, int n, uint32_t bits, type& a, type& b) {
    bits &= (1u << n) - 1u;
    a = _mm256_maskload_ps(p, lanes32(bits));
    b = _mm256_maskload_ps(p + 8, lanes32(bits >> 8));
  }
  DL_AVX2 void load_pair(const bf16* p, int n, uint32_t bits, type& a, type& b) {
    __m256i both;
    if (n == pair_width) {
      both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    } else {
      bf16 padded[pair_width] = {};
      std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(bf16));
      both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(padded));
    }
    both = _mm256_and_si256(both, lanes16(bits));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  DL_AVX2 void store_pair(float* p, int n, uint32_t bits, type a, type b) {
    a = _mm256_and_ps(a, _mm256_castsi256_ps(lanes32(bits)));
    b = _mm256_and_ps(b, _mm256_castsi256_ps(lanes32(bits >> 8)));
    if (n == pair_width) {
      _mm256_storeu_ps(p, a);
      _mm256_storeu_ps(p + 8, b);
      return;
    }
    float padded[pair_width];
    _mm256_storeu_ps(padded, a);
    _mm256_storeu_ps(padded + 8, b);
    std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(float));
  }
  DL_AVX2 void store_pair(bf16* p, int n, uint32_t bits, type a, type b) {
    const __m256i both = _mm256_and_si256(_mm256_blend_epi16(_mm256_srli_epi32(rounded(a), 16), rounded(b), 0xaa), lanes16(bits));
    if (n == pair_width) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), both);
      return;
    }
    bf16 padded[pair_width];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(padded), both);
    std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(bf16));
  }

 private:
  // Copies of what mask and row hold: a store to bits could, for all the compiler knows, change them.
  struct Constants {
    __m256i a, b, c, d, threshold, key0[dropout::kRounds], key1[dropout::kRounds];
  };
  DL_AVX2 Constants constants_of(const dropout::Mask& mask, const KeepRow& row) {
    Constants k;
    k.a = word(row.a);
    k.b = word(row.b);
    k.c = word(row.c);
    k.d = word(row.d);
    k.threshold = word32(mask.threshold);
    for (int round = 2; round < dropout::kRounds; ++round) {
      k.key0[round] = word(mask.key0[round]);
      k.key1[round] = word(mask.key1[round]);
    }
    return k;
  }
  // All bits of the 16-bit lanes whose number is kept, 16 features from 4 counters.
  DL_AVX2 __m256i keep16(const Constants& k, __m256i counter) {
    const __m256i m0 = word(dropout::kMultiplier0), m1 = word(dropout::kMultiplier1);
    const __m256i p0 = _mm256_mul_epu32(counter, m0);
    const __m256i p1 = _mm256_mul_epu32(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), k.a), m1);
    __m256i w3 = _mm256_mul_epu32(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), k.b), m0);
    __m256i w1 = _mm256_mul_epu32(_mm256_xor_si256(p0, k.c), m1);
    __m256i w0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(w1, 32), p1), k.key0[2]);
    __m256i w2 = _mm256_xor_si256(_mm256_srli_epi64(w3, 32), k.d);
#pragma GCC unroll 7
    for (int round = 3; round < dropout::kRounds; ++round) {
      const __m256i q0 = _mm256_mul_epu32(w0, m0), q1 = _mm256_mul_epu32(w2, m1);
      w0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(q1, 32), w1), k.key0[round]);
      w2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(q0, 32), w3), k.key1[round]);
      w1 = q1;
      w3 = q0;
    }
    const __m256i even = _mm256_blend_epi32(w0, _mm256_slli_epi64(w2, 32), 0xaa);
    const __m256i odd = _mm256_blend_epi32(w1, _mm256_slli_epi64(w3, 32), 0xaa);
    const __m256i keep_even = _mm256_cmpeq_epi32(_mm256_max_epu32(even, k.threshold), even);
    const __m256i keep_odd = _mm256_cmpeq_epi32(_mm256_max_epu32(odd, k.threshold), odd);
    return _mm256_blend_epi16(keep_even, keep_odd, 0xaa);
  }
  DL_AVX2 __m256i word(uint32_t a) { return _mm256_set1_epi64x(static_cast<int64_t>(a)); }
  DL_AVX2 __m256i word32(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
  // Lanes of ones where a bit is set.
  DL_AVX2 __m256i lanes16(uint32_t bits) {
    const __m256i each = _mm256_set_epi16(
        static_cast<short>(0x8000), 0x4000, 0x2000, 0x1000, 0x800, 0x400, 0x200, 0x100, 0x80, 0x40, 0x20, 0x10, 8, 4, 2, 1);
    return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(static_cast<short>(bits)), each), each);
  }
  DL_AVX2 __m256i lanes32(uint32_t bits) {
    const __m256i each = _mm256_set_epi32(0x80, 0x40, 0x20, 0x10, 8, 4, 2, 1);
    return _mm256_cmpeq_epi32(_mm256_and_si256(word32(bits), each), each);
  }
  // To the nearest bf16, ties to even, in the upper half of each number.
  DL_AVX2 __m256i rounded(type v) {
    const __m256i b = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd);
  }
};
#undef DL_AVX2

#define DL_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"), always_inline)) static inline
template <>
struct KeepVec<VecAvx512> {
  using type = __m512;
  static constexpr int pair_width = 32;

  DL_AVX512 void fill(const dropout::Mask& mask, const KeepRow& row, int64_t first, int64_t words, uint32_t* bits) {
    const __m512i m0 = word(dropout::kMultiplier0), m1 = word(dropout::kMultiplier1);
    const __m512i threshold = _mm512_set1_epi32(static_cast<int>(mask.threshold));
    // Copies: a store to bits could, for all the compiler knows, change what mask and row refer to.
    const __m512i a = word(row.a), b = word(row.b), c = word(row.c), d = word(row.d);
    __m512i key0[dropout::kRounds], key1[dropout::kRounds];
    for (int round = 2; round < dropout::kRounds; ++round) {
      key0[round] = word(mask.key0[round]);
      key1[round] = word(mask.key1[round]);
    }
    __m512i counter = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    for (int64_t j = 0; j < words; ++j) {
      const __m512i p0 = _mm512_mul_epu32(counter, m0);
      const __m512i p1 = _mm512_mul_epu32(_mm512_xor_si512(_mm512_srli_epi64(p0, 32), a), m1);
      __m512i w3 = _mm512_mul_epu32(_mm512_xor_si512(_mm512_srli_epi64(p1, 32), b), m0);
      __m512i w1 = _mm512_mul_epu32(_mm512_xor_si512(p0, c), m1);
      __m512i w0 = xor3(_mm512_srli_epi64(w1, 32), p1, key0[2]);
      __m512i w2 = _mm512_xor_si512(_mm512_srli_epi64(w3, 32), d);
#pragma GCC unroll 7
      for (int round = 3; round < dropout::kRounds; ++round) {
        const __m512i q0 = _mm512_mul_epu32(w0, m0), q1 = _mm512_mul_epu32(w2, m1);
        w0 = xor3(_mm512_srli_epi64(q1, 32), w1, key0[round]);
        w2 = xor3(_mm512_srli_epi64(q0, 32), w3, key1[round]);
        w1 = q1;
        w3 = q0;
      }
      counter = _mm512_add_epi64(counter, _mm512_set1_epi64(8));
      // Words 0 and 2 are the even elements of a counter's four, 1 and 3 the odd ones.
      const __m512i even = _mm512_mask_blend_epi32(0xaaaa, w0, _mm512_slli_epi64(w2, 32));
      const __m512i odd = _mm512_mask_blend_epi32(0xaaaa, w1, _mm512_slli_epi64(w3, 32));
      const __m512i keep_even = _mm512_movm_epi32(_mm512_cmpge_epu32_mask(even, threshold));
      const __m512i keep_odd = _mm512_movm_epi32(_mm512_cmpge_epu32_mask(odd, threshold));
      bits[j] = _mm512_movepi16_mask(_mm512_mask_blend_epi16(0xaaaaaaaau, keep_even, keep_odd));
    }
  }
  DL_AVX512 void load_pair(const float* p, int n, uint32_t bits, type& a, type& b) {
    bits &= first(n);
    a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p);
    b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits >> 16), p + 16);
  }
  DL_AVX512 void load_pair(const bf16* p, int n, uint32_t bits, type& a, type& b) {
    const __m512i both = _mm512_maskz_loadu_epi16(bits & first(n), p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  DL_AVX512 void store_pair(float* p, int n, uint32_t bits, type a, type b) {
    a = _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a);
    b = _mm512_maskz_mov_ps(static_cast<__mmask16>(bits >> 16), b);
    if (n == pair_width) {
      _mm512_storeu_ps(p, a);
      _mm512_storeu_ps(p + 16, b);
    } else {
      _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first(n)), a);
      _mm512_mask_storeu_ps(p + 16, static_cast<__mmask16>(first(n) >> 16), b);
    }
  }
  DL_AVX512 void store_pair(bf16* p, int n, uint32_t bits, type a, type b) {
    __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(rounded(a), 16), rounded(b));
    both = _mm512_maskz_mov_epi16(bits, both);
    if (n == pair_width)
      _mm512_storeu_si512(p, both);
    else
      _mm512_mask_storeu_epi16(p, first(n), both);
  }

 private:
  DL_AVX512 __m512i word(uint32_t a) { return _mm512_set1_epi64(static_cast<int64_t>(a)); }
  DL_AVX512 __m512i xor3(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  DL_AVX512 uint32_t first(int n) { return n == pair_width ? 0xffffffffu : (1u << n) - 1u; }
  // To the nearest bf16, ties to even, in the upper half of each number.
  DL_AVX512 __m512i rounded(type v) {
    const __m512i b = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd);
  }
};
#undef DL_AVX512

#endif  // __x86_64__

// Features whose bits are made at a time, a multiple of 32, and the words they need: one more where they start inside a counter.
constexpr int64_t kKeepChunk = 1024;
constexpr int64_t kKeepWords = kKeepChunk / 32 + 1;

}  // namespace dist_llm
