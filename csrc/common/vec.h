// One vector of fp32 numbers, for each instruction set, loaded from and stored to fp32 or bf16 memory.
//
// All have the same interface, so that a kernel is written once (see foreach_isa.h):
//   width                   numbers in a vector
//   set(a)                  all equal to a
//   load(p), store(p, v)    width numbers at any alignment
//   load_n(p, n), store_n   the first n < width numbers; the rest load as 0 and are not stored
//   mul(a, b), add(a, b), fma(a, b, c) = a * b + c, sum(v)
// bf16 memory is rounded to nearest even; a NaN stays a NaN.
//
// Each function carries its own target attribute instead of a flag for the whole file: code for newer processors
// can then never end up in a function that an older one runs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dist_llm {

// Storage of a bf16 number: the upper half of an fp32 one.
struct bf16 {
  uint16_t bits;
};

inline float to_float(float a) { return a; }
inline float to_float(bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline void from_float(float value, float* p) { *p = value; }
inline void from_float(float value, bf16* p) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool is_nan = value != value;
  p->bits = is_nan ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Plain loops: the compiler turns them into whatever the oldest supported processor has (SSE2, NEON).
struct VecGeneric {
  static constexpr int width = 8;
  struct type {
    float at[width];
  };
  static type set(float a) {
    type v;
    for (float& e : v.at) e = a;
    return v;
  }
  template <class S>
  static type load(const S* p) {
    type v;
    for (int i = 0; i < width; ++i) v.at[i] = to_float(p[i]);
    return v;
  }
  template <class S>
  static type load_n(const S* p, int n) {
    type v = set(0.f);
    for (int i = 0; i < n; ++i) v.at[i] = to_float(p[i]);
    return v;
  }
  template <class S>
  static void store(S* p, const type& v) {
    for (int i = 0; i < width; ++i) from_float(v.at[i], p + i);
  }
  template <class S>
  static void store_n(S* p, const type& v, int n) {
    for (int i = 0; i < n; ++i) from_float(v.at[i], p + i);
  }
  static type mul(const type& a, const type& b) {
    type v;
    for (int i = 0; i < width; ++i) v.at[i] = a.at[i] * b.at[i];
    return v;
  }
  static type add(const type& a, const type& b) {
    type v;
    for (int i = 0; i < width; ++i) v.at[i] = a.at[i] + b.at[i];
    return v;
  }
  static type fma(const type& a, const type& b, const type& c) {
    type v;
    for (int i = 0; i < width; ++i) v.at[i] = a.at[i] * b.at[i] + c.at[i];
    return v;
  }
  static float sum(const type& v) {
    return ((v.at[0] + v.at[4]) + (v.at[2] + v.at[6])) + ((v.at[1] + v.at[5]) + (v.at[3] + v.at[7]));
  }
};

#if defined(__x86_64__)

#define DL_AVX2 __attribute__((target("avx2,fma"), always_inline)) static inline
struct VecAvx2 {
  static constexpr int width = 8;
  using type = __m256;
  DL_AVX2 type set(float a) { return _mm256_set1_ps(a); }
  DL_AVX2 type load(const float* p) { return _mm256_loadu_ps(p); }
  DL_AVX2 type load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  template <class S>
  DL_AVX2 type load_n(const S* p, int n) {
    S padded[width] = {};
    std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(S));
    return load(padded);
  }
  DL_AVX2 void store(float* p, type v) { _mm256_storeu_ps(p, v); }
  DL_AVX2 void store(bf16* p, type v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i half = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), is_nan);
    // packus works inside each 128-bit lane; the permutation brings both results together.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  template <class S>
  DL_AVX2 void store_n(S* p, type v, int n) {
    S padded[width];
    store(padded, v);
    std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(S));
  }
  DL_AVX2 type mul(type a, type b) { return _mm256_mul_ps(a, b); }
  DL_AVX2 type add(type a, type b) { return _mm256_add_ps(a, b); }
  DL_AVX2 type fma(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
  DL_AVX2 float sum(type v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
};
#undef DL_AVX2

#define DL_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"), always_inline)) static inline
struct VecAvx512 {
  static constexpr int width = 16;
  using type = __m512;
  DL_AVX512 __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  DL_AVX512 type set(float a) { return _mm512_set1_ps(a); }
  DL_AVX512 type load(const float* p) { return _mm512_loadu_ps(p); }
  DL_AVX512 type load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  DL_AVX512 type load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  DL_AVX512 type load_n(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  DL_AVX512 void store(float* p, type v) { _mm512_storeu_ps(p, v); }
  DL_AVX512 void store(bf16* p, type v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
  DL_AVX512 void store_n(float* p, type v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  DL_AVX512 void store_n(bf16* p, type v, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }
  DL_AVX512 type mul(type a, type b) { return _mm512_mul_ps(a, b); }
  DL_AVX512 type add(type a, type b) { return _mm512_add_ps(a, b); }
  DL_AVX512 type fma(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
  DL_AVX512 float sum(type v) { return _mm512_reduce_add_ps(v); }

 private:
  DL_AVX512 type widen(__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  DL_AVX512 __m256i narrow(type v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), is_nan, _mm512_set1_epi32(0x7fc0)));
  }
};
#undef DL_AVX512

#endif  // __x86_64__

}  // namespace dist_llm
