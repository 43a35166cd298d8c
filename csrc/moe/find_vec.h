// Where a number is among others, for each instruction set.
//
// FindVec<V>::equal_in(p, v): a bit for each of the V::width numbers at p that equals those of v, the lowest bit for the first.
#pragma once

#include "common/vec.h"

namespace dist_llm::moe {

template <class V>
struct FindVec;

template <>
struct FindVec<VecGeneric> {
  static unsigned equal_in(const float* p, const VecGeneric::type& v) {
    unsigned bits = 0;
    for (int i = 0; i < VecGeneric::width; ++i) bits |= static_cast<unsigned>(p[i] == v.at[i]) << i;
    return bits;
  }
};

#if defined(__x86_64__)

template <>
struct FindVec<VecAvx2> {
  __attribute__((target("avx2,fma"), always_inline)) static inline unsigned equal_in(const float* p, __m256 v) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(p), v, _CMP_EQ_OQ)));
  }
};

template <>
struct FindVec<VecAvx512> {
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"), always_inline)) static inline unsigned equal_in(
      const float* p, __m512 v) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(p), v, _CMP_EQ_OQ);
  }
};

#endif  // __x86_64__

}  // namespace dist_llm::moe
