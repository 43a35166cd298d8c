// Where a number is among those of a vector, and what is below it, for each instruction set.
//
// FindVec<V>, for vectors of V:
//   equal(a, b)      a bit for each number of a that equals that of b, the lowest bit for the first
//   with(v, i, a)    v with a in place i
//   max_below(m, v, limit)   the larger of m and v where v < limit, m elsewhere
#pragma once

#include "common/vec.h"

namespace dist_llm::moe {

template <class V>
struct FindVec;

template <>
struct FindVec<VecGeneric> {
  using type = VecGeneric::type;
  static unsigned equal(const type& a, const type& b) {
    unsigned bits = 0;
    for (int i = 0; i < VecGeneric::width; ++i) bits |= static_cast<unsigned>(a.at[i] == b.at[i]) << i;
    return bits;
  }
  static type with(const type& v, int i, float a) {
    type changed = v;
    changed.at[i] = a;
    return changed;
  }
  static type max_below(const type& m, const type& v, const type& limit) {
    type larger = m;
    for (int i = 0; i < VecGeneric::width; ++i) larger.at[i] = v.at[i] < limit.at[i] && v.at[i] > m.at[i] ? v.at[i] : m.at[i];
    return larger;
  }
};

#if defined(__x86_64__)

#define DL_AVX2 __attribute__((target("avx2,fma"), always_inline)) static inline
template <>
struct FindVec<VecAvx2> {
  DL_AVX2 unsigned equal(__m256 a, __m256 b) { return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ))); }
  DL_AVX2 __m256 with(__m256 v, int i, float a) {
    const __m256i is_there = _mm256_cmpeq_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(i));
    return _mm256_blendv_ps(v, _mm256_set1_ps(a), _mm256_castsi256_ps(is_there));
  }
  DL_AVX2 __m256 max_below(__m256 m, __m256 v, __m256 limit) {
    return _mm256_blendv_ps(m, _mm256_max_ps(m, v), _mm256_cmp_ps(v, limit, _CMP_LT_OQ));
  }
};
#undef DL_AVX2

#define DL_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"), always_inline)) static inline
template <>
struct FindVec<VecAvx512> {
  DL_AVX512 unsigned equal(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  DL_AVX512 __m512 with(__m512 v, int i, float a) {
    return _mm512_mask_mov_ps(v, static_cast<__mmask16>(1u << i), _mm512_set1_ps(a));
  }
  DL_AVX512 __m512 max_below(__m512 m, __m512 v, __m512 limit) {
    return _mm512_mask_max_ps(m, _mm512_cmp_ps_mask(v, limit, _CMP_LT_OQ), m, v);
  }
};
#undef DL_AVX512

#endif  // __x86_64__

}  // namespace dist_llm::moe
