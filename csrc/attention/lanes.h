// The vector operations attention needs beyond common/vec.h, for each instruction set.
//
// Matrices are packed into 32-bit words: one fp32 number, or, where the processor multiplies bf16 pairs, two neighbours of the
// contracted dimension. Both kinds then go through the same product, acc[m][n] += a[m][k] . b[k][n] over words k: a word of `a` is
// broadcast, words of `b` are loaded a vector at a time. `pack` is the number of elements in a word.
//
//   dot(acc, a, b)                 acc + the product of each word
//   load_words(p), broadcast_word(p)
//   pack_row(src, n, dst, words)   n elements to consecutive words, zeros up to `words` (a multiple of width)
//   pack_pair(r0, r1, n, dst, w)   pack 2: dst[i] = word of (r0[i], r1[i]); pack 1: both rows, w words each. Zeros from n up to w;
//                                  a null row is zeros, and r1 is null where r0 is
//   store_pair(p, ld, v0, v1)      pack 2: p[i] = word of (v0[i], v1[i]); pack 1: v0 to p and v1 to p + ld
//   store_elements(p, v)           width consecutive elements, rounded to the packed type
//   transpose(src, ld, dst, ld)    width x width words
//   select(j, lo, hi, a, b)        a where lo <= j < hi, otherwise b
//   exp2<degree>(x)                relative error 3e-6, 1e-7, 2e-8 at degree 4, 5, 6, before rounding; 0 below -126
//   max, sub, div
// Each function carries its target attribute; see common/vec.h for the reason.
#pragma once

#include "common/vec.h"

namespace dist_llm {

// The polynomials p with p(0) = 1 closest to 2^x on [0, 1] in relative error; coefficients of x, x^2, ...
inline constexpr float kExp2Degree4[] = {0.693044841f, 0.241280213f, 0.052242469f, 0.0134266866f};
inline constexpr float kExp2Degree5[] = {0.693151295f, 0.240164444f, 0.0557999164f, 0.00901702698f, 0.00186713145f};
inline constexpr float kExp2Degree6[] = {0.693147063f, 0.240229309f, 0.0554852821f, 0.00967545155f, 0.00124678446f, 0.000216129236f};

template <int kDegree>
constexpr float exp2_coefficient(int power) {
  if constexpr (kDegree == 4) return kExp2Degree4[power - 1];
  if constexpr (kDegree == 5) return kExp2Degree5[power - 1];
  return kExp2Degree6[power - 1];
}

template <class V>
struct Lanes;

template <>
struct Lanes<VecGeneric> {
  using Vec = VecGeneric;
  using type = Vec::type;
  static constexpr int width = Vec::width, pack = 1, tile_rows = 4, tile_vecs = 1, exp_degree = 6, exp_degree_again = 6;
  static type dot(const type& acc, const type& a, const type& b) { return Vec::fma(a, b, acc); }
  static type load_words(const float* p) { return Vec::load(p); }
  static type broadcast_word(const float* p) { return Vec::set(*p); }
  template <class S>
  static void pack_row(const S* src, int64_t n, float* dst, int64_t words) {
    for (int64_t i = 0; i < n; ++i) dst[i] = to_float(src[i]);
    for (int64_t i = n; i < words; ++i) dst[i] = 0.f;
  }
  template <class S>
  static void pack_pair(const S* r0, const S* r1, int64_t n, float* dst, int64_t words) {
    pack_row(r0, r0 == nullptr ? 0 : n, dst, words);
    pack_row(r1, r1 == nullptr ? 0 : n, dst + words, words);
  }
  static void store_pair(float* p, int64_t ld, const type& v0, const type& v1) {
    Vec::store(p, v0);
    Vec::store(p + ld, v1);
  }
  static void store_elements(float* p, const type& v) { Vec::store(p, v); }
  static void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
    for (int r = 0; r < width; ++r) {
      for (int c = 0; c < width; ++c) dst[c * ld_dst + r] = src[r * ld_src + c];
    }
  }
  static type max(const type& a, const type& b) {
    type v;
    for (int i = 0; i < width; ++i) v.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
    return v;
  }
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
  static type select(float j, const type& lo, const type& hi, const type& a, const type& b) {
    type v;
    for (int i = 0; i < width; ++i) v.at[i] = lo.at[i] <= j && j < hi.at[i] ? a.at[i] : b.at[i];
    return v;
  }
  template <int kDegree>
  static type exp2(const type& x) {
    type v;
    for (int i = 0; i < width; ++i) {
      // Kept in the range of an exponent; a NaN stays one, since every comparison with it is false.
      const float y = x.at[i] < -127.f ? -127.f : (x.at[i] > 127.f ? 127.f : x.at[i]);
      const int32_t truncated = y == y ? static_cast<int32_t>(y) : 0;
      const int32_t floor = truncated - (y < static_cast<float>(truncated) ? 1 : 0);
      const float r = y - static_cast<float>(floor);
      float p = exp2_coefficient<kDegree>(kDegree);
      for (int power = kDegree - 1; power > 0; --power) p = p * r + exp2_coefficient<kDegree>(power);
      const uint32_t bits = static_cast<uint32_t>(floor + 127) << 23;
      float factor;
      std::memcpy(&factor, &bits, sizeof factor);
      v.at[i] = (p * r + 1.f) * factor;
    }
    return v;
  }
};

#if defined(__x86_64__)

#define DL_AVX2 __attribute__((target("avx2,fma"), always_inline)) static inline
template <>
struct Lanes<VecAvx2> {
  using Vec = VecAvx2;
  using type = __m256;
  static constexpr int width = Vec::width, pack = 1, tile_rows = 6, tile_vecs = 2, exp_degree = 6, exp_degree_again = 6;
  DL_AVX2 type dot(type acc, type a, type b) { return _mm256_fmadd_ps(a, b, acc); }
  DL_AVX2 type load_words(const float* p) { return _mm256_loadu_ps(p); }
  DL_AVX2 type broadcast_word(const float* p) { return _mm256_broadcast_ss(p); }
  template <class S>
  DL_AVX2 void pack_row(const S* src, int64_t n, float* dst, int64_t words) {
    int64_t i = 0;
    for (; i + width <= n; i += width) Vec::store(dst + i, Vec::load(src + i));
    if (i < n) {
      Vec::store(dst + i, Vec::load_n(src + i, static_cast<int>(n - i)));
      i += width;
    }
    for (; i < words; i += width) Vec::store(dst + i, Vec::set(0.f));
  }
  template <class S>
  DL_AVX2 void pack_pair(const S* r0, const S* r1, int64_t n, float* dst, int64_t words) {
    pack_row(r0, r0 == nullptr ? 0 : n, dst, words);
    pack_row(r1, r1 == nullptr ? 0 : n, dst + words, words);
  }
  DL_AVX2 void store_pair(float* p, int64_t ld, type v0, type v1) {
    Vec::store(p, v0);
    Vec::store(p + ld, v1);
  }
  DL_AVX2 void store_elements(float* p, type v) { _mm256_storeu_ps(p, v); }
  DL_AVX2 void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * ld_src);
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(dst + i * ld_dst, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      _mm256_storeu_ps(dst + (i + 4) * ld_dst, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
  }
  // A NaN in b comes out of max: the score is the second argument wherever that matters.
  DL_AVX2 type max(type a, type b) { return _mm256_max_ps(a, b); }
  DL_AVX2 type sub(type a, type b) { return _mm256_sub_ps(a, b); }
  DL_AVX2 type div(type a, type b) { return _mm256_div_ps(a, b); }
  DL_AVX2 type select(float j, type lo, type hi, type a, type b) {
    const __m256 at = _mm256_set1_ps(j);
    return _mm256_blendv_ps(b, a, _mm256_and_ps(_mm256_cmp_ps(lo, at, _CMP_LE_OQ), _mm256_cmp_ps(at, hi, _CMP_LT_OQ)));
  }
  template <int kDegree>
  DL_AVX2 type exp2(type x) {
    const __m256 y = _mm256_min_ps(_mm256_set1_ps(127.f), _mm256_max_ps(_mm256_set1_ps(-127.f), x));
    const __m256 floor = _mm256_floor_ps(y);
    const __m256 r = _mm256_sub_ps(y, floor);
    __m256 p = _mm256_set1_ps(exp2_coefficient<kDegree>(kDegree));
    for (int power = kDegree - 1; power > 0; --power) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(exp2_coefficient<kDegree>(power)));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.f));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(floor), _mm256_set1_epi32(127));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
};
#undef DL_AVX2

#define DL_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"), always_inline)) static inline
template <>
struct Lanes<VecAvx512> {
  using Vec = VecAvx512;
  using type = __m512;
  static constexpr int width = Vec::width, pack = 1, tile_rows = 6, tile_vecs = 4, exp_degree = 6, exp_degree_again = 6;
  DL_AVX512 type dot(type acc, type a, type b) { return _mm512_fmadd_ps(a, b, acc); }
  DL_AVX512 type load_words(const float* p) { return _mm512_loadu_ps(p); }
  DL_AVX512 type broadcast_word(const float* p) { return _mm512_set1_ps(*p); }
  template <class S>
  DL_AVX512 void pack_row(const S* src, int64_t n, float* dst, int64_t words) {
    int64_t i = 0;
    for (; i + width <= n; i += width) Vec::store(dst + i, Vec::load(src + i));
    if (i < n) {
      Vec::store(dst + i, Vec::load_n(src + i, static_cast<int>(n - i)));
      i += width;
    }
    for (; i < words; i += width) Vec::store(dst + i, Vec::set(0.f));
  }
  template <class S>
  DL_AVX512 void pack_pair(const S* r0, const S* r1, int64_t n, float* dst, int64_t words) {
    pack_row(r0, r0 == nullptr ? 0 : n, dst, words);
    pack_row(r1, r1 == nullptr ? 0 : n, dst + words, words);
  }
  DL_AVX512 void store_pair(float* p, int64_t ld, type v0, type v1) {
    Vec::store(p, v0);
    Vec::store(p + ld, v1);
  }
  DL_AVX512 void store_elements(float* p, type v) { _mm512_storeu_ps(p, v); }
  DL_AVX512 void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
    __m512 r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(src + i * ld_src);
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    // r[4 g + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 g ... 4 g + 3, one 128-bit lane each.
    for (int c = 0; c < 4; ++c) {
      const __m512 a = _mm512_shuffle_f32x4(r[c], r[c + 4], 0x44), b = _mm512_shuffle_f32x4(r[c], r[c + 4], 0xee);
      const __m512 d = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0x44), e = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0xee);
      _mm512_storeu_ps(dst + c * ld_dst, _mm512_shuffle_f32x4(a, d, 0x88));
      _mm512_storeu_ps(dst + (c + 4) * ld_dst, _mm512_shuffle_f32x4(a, d, 0xdd));
      _mm512_storeu_ps(dst + (c + 8) * ld_dst, _mm512_shuffle_f32x4(b, e, 0x88));
      _mm512_storeu_ps(dst + (c + 12) * ld_dst, _mm512_shuffle_f32x4(b, e, 0xdd));
    }
  }
  // A NaN in b comes out of max: the score is the second argument wherever that matters.
  DL_AVX512 type max(type a, type b) { return _mm512_max_ps(a, b); }
  DL_AVX512 type sub(type a, type b) { return _mm512_sub_ps(a, b); }
  DL_AVX512 type div(type a, type b) { return _mm512_div_ps(a, b); }
  DL_AVX512 type select(float j, type lo, type hi, type a, type b) {
    const __m512 at = _mm512_set1_ps(j);
    const __mmask16 inside = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(lo, at, _CMP_LE_OQ), at, hi, _CMP_LT_OQ);
    return _mm512_mask_blend_ps(inside, b, a);
  }
  template <int kDegree>
  DL_AVX512 type exp2(type x) {
    const __m512 r = _mm512_reduce_ps(x, 0x09);  // x - floor(x); scalef takes the floor by itself
    __m512 p = _mm512_set1_ps(exp2_coefficient<kDegree>(kDegree));
    for (int power = kDegree - 1; power > 0; --power) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(exp2_coefficient<kDegree>(power)));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f)), x);
  }
};
#undef DL_AVX512

// AVX-512 with products of bf16 pairs: the same vectors of fp32 numbers, and words of two bf16 ones.
struct VecAvx512Bf16 : VecAvx512 {};

#define DL_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"), always_inline)) static inline
template <>
struct Lanes<VecAvx512Bf16> : Lanes<VecAvx512> {
  // Probabilities are rounded to bf16 when they are recomputed; degree 4 is three digits finer than that.
  static constexpr int pack = 2, exp_degree = 5, exp_degree_again = 4;
  DL_AVX512 type dot(type acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
  DL_AVX512 __m512i load_words(const float* p) { return _mm512_loadu_si512(p); }
  DL_AVX512 __m512i broadcast_word(const float* p) { return _mm512_castps_si512(_mm512_set1_ps(*p)); }
  DL_AVX512 void pack_row(const bf16* src, int64_t n, float* dst, int64_t words) {
    int64_t i = 0;
    for (; 2 * (i + width) <= n; i += width) _mm512_storeu_si512(dst + i, _mm512_loadu_si512(src + 2 * i));
    if (2 * i < n) {
      const __mmask32 there = (__mmask32{1} << (n - 2 * i)) - 1;
      _mm512_storeu_si512(dst + i, _mm512_maskz_loadu_epi16(there, src + 2 * i));
      i += width;
    }
    for (; i < words; i += width) _mm512_storeu_si512(dst + i, _mm512_setzero_si512());
  }
  DL_AVX512 void pack_pair(const bf16* r0, const bf16* r1, int64_t n, float* dst, int64_t words) {
    if (r0 == nullptr) n = 0;
    int64_t i = 0;
    if (r1 != nullptr) {
      for (; i + width <= n; i += width) {
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(r0 + i)));
        const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(r1 + i)));
        _mm512_storeu_si512(dst + i, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
    for (; i < words; i += width) {
      const int64_t left = n - i;
      const __mmask16 there = left >= width ? 0xffffu : left <= 0 ? 0u : static_cast<__mmask16>((1u << left) - 1u);
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, r0 + i));
      const __m512i odd = r1 == nullptr ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, r1 + i));
      _mm512_storeu_si512(dst + i, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
  DL_AVX512 void store_pair(float* p, int64_t, type v0, type v1) {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(v1, v0)));
  }
  DL_AVX512 void store_elements(float* p, type v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
};
#undef DL_AVX512

#endif  // __x86_64__

}  // namespace dist_llm
