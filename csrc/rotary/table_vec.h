// Fp32 numbers in the order in which SoftmaxVec<V>::load_pair<S> delivers elements of S, for each instruction set.
//
// TableVec<V, S>::load_pair(p, a, b): pair_width numbers at p. Bf16 pairs are even and odd elements where they are loaded by a shift and
// a mask; everything else is in the order of memory.
#pragma once

#include "common/softmax_vec.h"

namespace dist_llm {

template <class V, class S>
struct TableVec;

template <class S>
struct TableVec<VecGeneric, S> {
  static void load_pair(const float* p, VecGeneric::type& a, VecGeneric::type& b) { SoftmaxVec<VecGeneric>::load_pair(p, a, b); }
};

#if defined(__x86_64__)

#define DL_AVX2 __attribute__((target("avx2,fma"), always_inline)) static inline
template <>
struct TableVec<VecAvx2, float> {
  DL_AVX2 void load_pair(const float* p, __m256& a, __m256& b) { SoftmaxVec<VecAvx2>::load_pair(p, a, b); }
};
template <>
struct TableVec<VecAvx2, bf16> {
  DL_AVX2 void load_pair(const float* p, __m256& a, __m256& b) {
    const __m256 first = _mm256_loadu_ps(p), second = _mm256_loadu_ps(p + 8);
    // Even (odd) elements of both inside each 128-bit lane, then the lanes' halves into order.
    a = in_order(_mm256_shuffle_ps(first, second, 0x88));
    b = in_order(_mm256_shuffle_ps(first, second, 0xdd));
  }

 private:
  DL_AVX2 __m256 in_order(__m256 v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); }
};
#undef DL_AVX2

#define DL_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"), always_inline)) static inline
template <>
struct TableVec<VecAvx512, float> {
  DL_AVX512 void load_pair(const float* p, __m512& a, __m512& b) { SoftmaxVec<VecAvx512>::load_pair(p, a, b); }
};
template <>
struct TableVec<VecAvx512, bf16> {
  DL_AVX512 void load_pair(const float* p, __m512& a, __m512& b) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512 first = _mm512_loadu_ps(p), second = _mm512_loadu_ps(p + 16);
    a = _mm512_permutex2var_ps(first, even, second);
    b = _mm512_permutex2var_ps(first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), second);
  }
};
#undef DL_AVX512

#endif  // __x86_64__

}  // namespace dist_llm
