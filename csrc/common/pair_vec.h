// Pairs of vectors for ops that go along the columns of a matrix: what SoftmaxVec (softmax_vec.h) has of them, and
//
//   load_pair_or_zero(p, n, a, b)   the first n < pair_width numbers; the rest are 0 and add nothing to a sum
//   store_pair_even(p, a, b)        store_pair, ties to even: for a sum of two bf16 numbers, where ties are common
//   store_pair_even_n(p, a, b, n)   its first n < pair_width numbers
//
// A pair of bf16 vectors is loaded in an order of its own (neighbours in different vectors). Numbers that meet such a pair but are
// kept in fp32 are put into that order once and padded with zeros: pair_columns.inc.
#pragma once

#include "common/softmax_vec.h"

namespace dist_llm {

template <class V>
struct PairVec;

template <>
struct PairVec<VecGeneric> : SoftmaxVec<VecGeneric> {
  template <class S>
  static void load_pair_or_zero(const S* p, int n, type& a, type& b) {
    for (int i = 0; i < width; ++i) a.at[i] = i < n ? to_float(p[i]) : 0.f;
    for (int i = 0; i < width; ++i) b.at[i] = width + i < n ? to_float(p[width + i]) : 0.f;
  }
  template <class S>
  static void store_pair_even(S* p, const type& a, const type& b) {
    store_pair(p, a, b);
  }
  template <class S>
  static void store_pair_even_n(S* p, const type& a, const type& b, int n) {
    store_pair_n(p, a, b, n);
  }
};

#if defined(__x86_64__)

#define DL_AVX2 __attribute__((target("avx2,fma"), always_inline)) static inline
template <>
struct PairVec<VecAvx2> : SoftmaxVec<VecAvx2> {
  template <class S>
  DL_AVX2 void load_pair_or_zero(const S* p, int n, type& a, type& b) {
    S padded[pair_width] = {};
    std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(S));
    load_pair(padded, a, b);
  }
  template <class S>
  DL_AVX2 void store_pair_even(S* p, type a, type b) {
    store_pair(p, a, b);
  }
  template <class S>
  DL_AVX2 void store_pair_even_n(S* p, type a, type b, int n) {
    store_pair_n(p, a, b, n);
  }
};
#undef DL_AVX2

#define DL_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"), always_inline)) static inline
template <>
struct PairVec<VecAvx512> : SoftmaxVec<VecAvx512> {
  DL_AVX512 void load_pair_or_zero(const float* p, int n, type& a, type& b) {
    a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first(n)), p);
    b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first(n) >> 16), p + 16);
  }
  DL_AVX512 void load_pair_or_zero(const bf16* p, int n, type& a, type& b) {
    const __m512i both = _mm512_maskz_loadu_epi16(first(n), p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  DL_AVX512 void store_pair_even(float* p, type a, type b) { store_pair(p, a, b); }
  DL_AVX512 void store_pair_even_n(float* p, type a, type b, int n) { store_pair_n(p, a, b, n); }
  DL_AVX512 void store_pair_even(bf16* p, type a, type b) { _mm512_storeu_si512(p, narrow_even(a, b)); }
  DL_AVX512 void store_pair_even_n(bf16* p, type a, type b, int n) { _mm512_mask_storeu_epi16(p, first(n), narrow_even(a, b)); }

 private:
  DL_AVX512 __mmask32 first(int n) { return static_cast<__mmask32>((1u << n) - 1u); }
  // To the nearest bf16, in the upper half of each number.
  DL_AVX512 __m512i rounded_even(type v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  }
  DL_AVX512 __m512i narrow_even(type a, type b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(rounded_even(a), 16), rounded_even(b));
  }
};
#undef DL_AVX512

#endif  // __x86_64__

}  // namespace dist_llm
