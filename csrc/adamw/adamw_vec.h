// What AdamW needs beside vec.h, for each instruction set: square roots, quotients, and a sum of squares in fp64.
//
// AdamVec<V> adds to the vector type V:
//   sub(a, b), div(a, b), sqrt(a)     correctly rounded, as torch's fused AdamW has them
//   Squares                           V::width running sums in fp64: zero(), add(sums, v) adds v^2, merge(a, b), total(sums)
#pragma once

#include "common/vec.h"

namespace dist_llm {

template <class V>
struct AdamVec;

template <>
struct AdamVec<VecGeneric> {
  using type = VecGeneric::type;
  static constexpr int width = VecGeneric::width;
  struct Squares {
    double at[width];
  };
  static type sub(const type& a, const type& b) {
    type v;
    for (int i = 0; i < width; ++i) v.at[i] = a.at[i] - b.at[i];
    return v;
  }
  static type div(const type& a, const type& b) {
    type v;
    for (int i = 0; i < width; ++i) v.at[i] = a.at[i] / b.at[i];
    return v;
  }
  static type sqrt(const type& a) {
    type v;
    for (int i = 0; i < width; ++i) v.at[i] = __builtin_sqrtf(a.at[i]);
    return v;
  }
  static Squares zero() { return {}; }
  static Squares add(Squares s, const type& v) {
    for (int i = 0; i < width; ++i) s.at[i] += static_cast<double>(v.at[i]) * static_cast<double>(v.at[i]);
    return s;
  }
  static Squares merge(Squares a, const Squares& b) {
    for (int i = 0; i < width; ++i) a.at[i] += b.at[i];
    return a;
  }
  static double total(const Squares& s) {
    return ((s.at[0] + s.at[4]) + (s.at[2] + s.at[6])) + ((s.at[1] + s.at[5]) + (s.at[3] + s.at[7]));
  }
};

#if defined(__x86_64__)

#define DL_AVX2 __attribute__((target("avx2,fma"), always_inline)) static inline
template <>
struct AdamVec<VecAvx2> {
  using type = __m256;
  struct Squares {
    __m256d low, high;
  };
  DL_AVX2 type sub(type a, type b) { return _mm256_sub_ps(a, b); }
  DL_AVX2 type div(type a, type b) { return _mm256_div_ps(a, b); }
  DL_AVX2 type sqrt(type a) { return _mm256_sqrt_ps(a); }
  DL_AVX2 Squares zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  DL_AVX2 Squares add(Squares s, type v) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    return {_mm256_fmadd_pd(low, low, s.low), _mm256_fmadd_pd(high, high, s.high)};
  }
  DL_AVX2 Squares merge(Squares a, Squares b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }
  DL_AVX2 double total(Squares s) {
    const __m256d four = _mm256_add_pd(s.low, s.high);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};
#undef DL_AVX2

#define DL_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"), always_inline)) static inline
template <>
struct AdamVec<VecAvx512> {
  using type = __m512;
  struct Squares {
    __m512d low, high;
  };
  DL_AVX512 type sub(type a, type b) { return _mm512_sub_ps(a, b); }
  DL_AVX512 type div(type a, type b) { return _mm512_div_ps(a, b); }
  DL_AVX512 type sqrt(type a) { return _mm512_sqrt_ps(a); }
  DL_AVX512 Squares zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  DL_AVX512 Squares add(Squares s, type v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    return {_mm512_fmadd_pd(low, low, s.low), _mm512_fmadd_pd(high, high, s.high)};
  }
  DL_AVX512 Squares merge(Squares a, Squares b) { return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)}; }
  DL_AVX512 double total(Squares s) { return _mm512_reduce_add_pd(_mm512_add_pd(s.low, s.high)); }
};
#undef DL_AVX512

#endif  // __x86_64__

}  // namespace dist_llm
