// Arithmetic and elementary functions beside vec.h and softmax_vec.h, for each instruction set.
//
// VecMath<V> has for vectors of V:
//   sub(a, b), div(a, b), sqrt(a), abs(a), negate(a)
//   max(a, b), min(a, b)       the second where one of them is a NaN: with the limit as the first argument, a NaN passes a clamp
//   with_sign(size, sign)      size with the sign bit of sign; size must be positive
//   if_less(a, b, x, y)        x where a < b, else y (also where a or b is a NaN)
//   exp<Exactness>(x)          e^x over the whole range: 0 below -104, infinite above 88.73
//   exp2_rough(t)              2^t; t in [-126, 128) where clamps is true, anywhere where it is false (0, subnormal or infinite outside)
//   reciprocal<Exactness>(d)   1 / d
//   one_over_1_plus_exp2_rough(t)   1 / (1 + 2^t), any t; 0 above 126
//   sigmoid<Exactness>(x)      1 / (1 + e^-x), 0 below -88.73 (rough: -87.3)
//   tanh<Exactness>(x)
// A NaN gives a NaN. full is for results in fp32, rough for results that are rounded to bf16, whose rounding is up to 3.9e-3 (relative).
//
// Largest relative errors over a million arguments of each function's range, against float64:
//               full      rough
//   exp         1.1e-7    3.0e-6
//   exp2                  8.1e-5
//   reciprocal  6.0e-8    5.5e-5 (AVX-512; elsewhere it is the full one)
//   sigmoid     1.6e-7    1.2e-4
//   tanh        1.9e-7    7.3e-5
#pragma once

#include "common/softmax_vec.h"
#include "common/vec.h"

namespace dist_llm {

// 2^r on [0, 1], relative error 7.5e-5; Remez' algorithm, coefficients rounded to fp32. The second for |r| <= 1/2.
constexpr float kExp2Floor[4] = {0x1.fff632p-1f, 0x1.64444cp-1f, 0x1.cefc4cp-3f, 0x1.3f96a4p-4f};
constexpr float kExp2Nearest[4] = {0x1.fff692p-1f, 0x1.62f31ap-1f, 0x1.f0de1ap-3f, 0x1.c3f760p-5f};
// e^x is infinite in fp32 from a little below it on; up to it 2^n with n = 128 in two factors does not overflow by itself.
constexpr float kExpCeiling = 89.f;
// tanh(x) = x + x z P(z), z = x^2, on |x| <= kTanhNear: relative error 1.1e-9 and 1.4e-6; beyond it, 1 - 2 / (1 + e^2x) loses no digit.
constexpr float kTanhNear = 0.55f;
constexpr float kTanhFull[5] = {-0x1.55554ap-2f, 0x1.110d26p-3f, -0x1.b9287ap-5f, 0x1.593d08p-6f, -0x1.9b3046p-8f};
constexpr float kTanhRough[3] = {-0x1.553e36p-2f, 0x1.0d5c3ap-3f, -0x1.611282p-5f};

template <class V>
struct VecMath;

template <>
struct VecMath<VecGeneric> {
  using V = VecGeneric;
  using type = VecGeneric::type;
  static constexpr bool clamps = true;

  static type sub(const type& a, const type& b) {
    type v;
    for (int i = 0; i < V::width; ++i) v.at[i] = a.at[i] - b.at[i];
    return v;
  }
  static type div(const type& a, const type& b) {
    type v;
    for (int i = 0; i < V::width; ++i) v.at[i] = a.at[i] / b.at[i];
    return v;
  }
  static type sqrt(const type& a) {
    type v;
    for (int i = 0; i < V::width; ++i) v.at[i] = __builtin_sqrtf(a.at[i]);
    return v;
  }
  static type abs(const type& a) {
    type v;
    for (int i = 0; i < V::width; ++i) v.at[i] = __builtin_fabsf(a.at[i]);
    return v;
  }
  static type negate(const type& a) {
    type v;
    for (int i = 0; i < V::width; ++i) v.at[i] = -a.at[i];
    return v;
  }
  static type max(const type& a, const type& b) {
    type v;
    for (int i = 0; i < V::width; ++i) v.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
    return v;
  }
  static type min(const type& a, const type& b) {
    type v;
    for (int i = 0; i < V::width; ++i) v.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i];
    return v;
  }
  static type with_sign(const type& size, const type& sign) {
    type v;
    for (int i = 0; i < V::width; ++i) v.at[i] = __builtin_copysignf(size.at[i], sign.at[i]);
    return v;
  }
  static type if_less(const type& a, const type& b, const type& x, const type& y) {
    type v;
    for (int i = 0; i < V::width; ++i) v.at[i] = a.at[i] < b.at[i] ? x.at[i] : y.at[i];
    return v;
  }
  static type exp2_rough(const type& t) {
    type v;
    for (int i = 0; i < V::width; ++i) {
      const float shifted = t.at[i] + kRoundingShift;
      const float r = t.at[i] - (shifted - kRoundingShift);
      float q = kExp2Nearest[3];
      for (int k = 2; k >= 0; --k) q = q * r + kExp2Nearest[k];
      uint32_t bits, power;
      std::memcpy(&bits, &q, sizeof bits);
      std::memcpy(&power, &shifted, sizeof power);
      bits += power << 23;  // the exponent: the whole part is in the lowest bits of the shifted number
      std::memcpy(&v.at[i], &bits, sizeof bits);
    }
    return v;
  }
  template <Exactness exactness>
  static type reciprocal(const type& d) {
    return div(V::set(1.f), d);
  }
#define DL_MATH static inline
#include "common/vec_math.inc"
#undef DL_MATH
};

#if defined(__x86_64__)

#define DL_MATH __attribute__((target("avx2,fma"), always_inline)) static inline
template <>
struct VecMath<VecAvx2> {
  using V = VecAvx2;
  using type = __m256;
  static constexpr bool clamps = true;

  DL_MATH type sub(type a, type b) { return _mm256_sub_ps(a, b); }
  DL_MATH type div(type a, type b) { return _mm256_div_ps(a, b); }
  DL_MATH type sqrt(type a) { return _mm256_sqrt_ps(a); }
  DL_MATH type abs(type a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
  DL_MATH type negate(type a) { return _mm256_xor_ps(_mm256_set1_ps(-0.f), a); }
  DL_MATH type max(type a, type b) { return _mm256_max_ps(a, b); }
  DL_MATH type min(type a, type b) { return _mm256_min_ps(a, b); }
  DL_MATH type with_sign(type size, type sign) { return _mm256_or_ps(size, _mm256_and_ps(_mm256_set1_ps(-0.f), sign)); }
  DL_MATH type if_less(type a, type b, type x, type y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  DL_MATH type exp2_rough(type t) {
    const type shifted = _mm256_add_ps(t, _mm256_set1_ps(kRoundingShift));
    const type r = _mm256_sub_ps(t, _mm256_sub_ps(shifted, _mm256_set1_ps(kRoundingShift)));
    type q = _mm256_set1_ps(kExp2Nearest[3]);
    for (int k = 2; k >= 0; --k) q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(kExp2Nearest[k]));
    // The whole part, in the lowest bits of the shifted number, is added to the exponent.
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(q), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
  }
  template <Exactness exactness>
  DL_MATH type reciprocal(type d) {
    return div(V::set(1.f), d);
  }
#include "common/vec_math.inc"
};
#undef DL_MATH

#define DL_MATH __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"), always_inline)) static inline
template <>
struct VecMath<VecAvx512> {
  using V = VecAvx512;
  using type = __m512;
  static constexpr bool clamps = false;  // the exponent of scalef saturates by itself

  DL_MATH type sub(type a, type b) { return _mm512_sub_ps(a, b); }
  DL_MATH type div(type a, type b) { return _mm512_div_ps(a, b); }
  DL_MATH type sqrt(type a) { return _mm512_sqrt_ps(a); }
  DL_MATH type abs(type a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.f), a); }
  DL_MATH type negate(type a) { return _mm512_xor_ps(_mm512_set1_ps(-0.f), a); }
  DL_MATH type max(type a, type b) { return _mm512_max_ps(a, b); }
  DL_MATH type min(type a, type b) { return _mm512_min_ps(a, b); }
  DL_MATH type with_sign(type size, type sign) { return _mm512_or_ps(size, _mm512_and_ps(_mm512_set1_ps(-0.f), sign)); }
  DL_MATH type if_less(type a, type b, type x, type y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
  }
  DL_MATH type exp2_rough(type t) {
    const type r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t - floor(t); 0 of an infinite t
    type q = _mm512_set1_ps(kExp2Floor[3]);
    for (int k = 2; k >= 0; --k) q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(kExp2Floor[k]));
    return _mm512_scalef_ps(q, t);  // q 2^floor(t)
  }
  template <Exactness exactness>
  DL_MATH type reciprocal(type d) {
    if constexpr (exactness == Exactness::rough) return _mm512_rcp14_ps(d);
    return div(V::set(1.f), d);
  }
#include "common/vec_math.inc"
};
#undef DL_MATH

#endif  // __x86_64__

}  // namespace dist_llm
