// What a softmax needs beside vec.h, for each instruction set: pairs of vectors, max, and exp of numbers that are not positive.
//
// SoftmaxVec<V> adds to the vector type V:
//   pair_width             numbers in a pair of vectors, 2 * V::width
//   load_pair(p, a, b)     pair_width numbers into a and b, in an order of its own: bf16 memory then needs a shift and a mask, no shuffle
//   load_pair_n(p, n, ..)  the first n < pair_width numbers; the rest are -inf, whose exp is 0
//   store_pair(p, a, b)    the inverse of load_pair; store_pair_n, of load_pair_n
//   stream_pair(p, a, b)   store_pair past the caches to an address that is a multiple of stream_align (0: there is no such store);
//                          stream_end() orders these stores before what follows
//   max(a, b)              the larger; b where a is a NaN
//   biggest(v)             the largest element
//   exp<Exactness>(d)      e^d for d <= 0, 0 for d < -104, a NaN for a NaN; rough is good for a result that is rounded to bf16
//
// store_pair to bf16 rounds to nearest; AVX-512 rounds ties away from zero, which is one addition, the others to even. A NaN stays
// one unless its lower bits carry into a largest upper half: not so with NaNs from bf16 memory or from arithmetic.
#pragma once

#include "common/vec.h"

namespace dist_llm {

// How good an exponential is to be. full: to the last digits of fp32. rough: for a result that is rounded to bf16. sum: for a sum of
// many exponentials of bf16 numbers; each may be off by 5e-8, in either direction.
enum class Exactness { full, sum, rough };

// e^r on |r| <= ln(2) / 2 as 1 + r q(r), the relative error least; Remez' algorithm, coefficients rounded to fp32.
// full: 2e-9 before rounding, rough: 3e-6.
constexpr float kExpFull[6] = {0x1p+0f, 0x1.fffffcp-2f, 0x1.555418p-3f, 0x1.555824p-5f, 0x1.1267d8p-7f, 0x1.6ae6e0p-10f};
constexpr float kExpRough[4] = {0x1.fffba6p-1f, 0x1.0003f6p-1f, 0x1.57cf54p-3f, 0x1.541480p-5f};
constexpr float kLog2E = 0x1.715476p+0f;
// ln(2) in two parts; the first has so few digits that its product with a whole number up to 256 is exact.
constexpr float kLn2High = 0x1.62e4p-1f;
constexpr float kLn2Low = 0x1.7f7d1cp-20f;
// Below it e^d is less than half of the smallest fp32 number.
constexpr float kExpFloor = -104.f;
// Added and subtracted again, it rounds a number below 2^22 to a whole one, which is then in the lowest bits of the sum.
constexpr float kRoundingShift = 0x1.8p+23f;
constexpr float kMinusInf = -__builtin_inff();

// For a table of 2^(j / 32): ln(2) / 32, and e^r - 1 on |r| <= ln(2) / 64 as r + r^2 (c0 + c1 r), good to 1e-10.
constexpr float kStepsOfLog2 = 0x1.715476p+5f;
constexpr float kLn2Step = 0x1.62e430p-6f;
constexpr float kExpStep[2] = {0x1.000088p-1f, 0x1.5555c8p-3f};
// The same as r (c0 + c1 r), good to 5e-8.
constexpr float kExpStepShort[2] = {0x1.0000f6p+0f, 0x1.000088p-1f};
// The best 1 + r with a factor before it: h^2 / 4, h the largest |r|, is half of the error of 1 + r alone.
constexpr double kExpLine = 1. + 0x1.ebfcp-16;
constexpr float kPowers[32] = {
    0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f, 0x1.29e9e0p+0f,
    0x1.306fe0p+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f, 0x1.6247ecp+0f,
    0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f,
    0x1.ae89fap+0f, 0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f};

template <class V>
struct SoftmaxVec;

// The largest of many numbers without turning them into fp32, where there is such a way. Only where `exists`, as below.
template <class V, class S>
struct Largest {
  static constexpr bool exists = false;
};

// factor * e^(x - max) in fewer instructions than exp and a product, for most max and factor, where there is such a way.
template <class V, Exactness exactness>
struct ExpTable {
  static constexpr bool exists = false;
};

template <>
struct SoftmaxVec<VecGeneric> {
  using type = VecGeneric::type;
  static constexpr int width = VecGeneric::width;
  static constexpr int pair_width = 2 * width;
  static constexpr int stream_align = 0;
  template <class S>
  static void load_pair(const S* p, type& a, type& b) {
    a = VecGeneric::load(p);
    b = VecGeneric::load(p + width);
  }
  template <class S>
  static void load_pair_n(const S* p, int n, type& a, type& b) {
    for (int i = 0; i < width; ++i) a.at[i] = i < n ? to_float(p[i]) : kMinusInf;
    for (int i = 0; i < width; ++i) b.at[i] = width + i < n ? to_float(p[width + i]) : kMinusInf;
  }
  template <class S>
  static void store_pair(S* p, const type& a, const type& b) {
    VecGeneric::store(p, a);
    VecGeneric::store(p + width, b);
  }
  template <class S>
  static void store_pair_n(S* p, const type& a, const type& b, int n) {
    for (int i = 0; i < width && i < n; ++i) from_float(a.at[i], p + i);
    for (int i = width; i < n; ++i) from_float(b.at[i - width], p + i);
  }
  template <class S>
  static void stream_pair(S* p, const type& a, const type& b) {
    store_pair(p, a, b);
  }
  static void stream_end() {}
  static type max(const type& a, const type& b) {
    type v;
    for (int i = 0; i < width; ++i) v.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
    return v;
  }
  static float biggest(const type& v) {
    float m = v.at[0];
    for (int i = 1; i < width; ++i) m = m > v.at[i] ? m : v.at[i];
    return m;
  }
  template <Exactness exactness>
  static type exp(const type& d) {
    type v;
    for (int i = 0; i < width; ++i) {
      // Two factors of 2: n reaches -151, where one of them would no longer have an exponent.
      const float x = kExpFloor > d.at[i] ? kExpFloor : d.at[i];
      const float shifted = x * kLog2E + kRoundingShift;
      const float n = shifted - kRoundingShift;
      const float r = (x - n * kLn2High) - n * kLn2Low;
      float q;
      if constexpr (exactness != Exactness::rough) {
        q = kExpFull[5];
        for (int k = 4; k >= 0; --k) q = q * r + kExpFull[k];
      } else {
        q = kExpRough[3];
        for (int k = 2; k >= 0; --k) q = q * r + kExpRough[k];
      }
      uint32_t bits;
      std::memcpy(&bits, &shifted, sizeof bits);
      const int32_t whole = static_cast<int32_t>(bits << 9) >> 9;
      const int32_t half = whole >> 1;
      const uint32_t first_bits = static_cast<uint32_t>(half + 127) << 23;
      const uint32_t second_bits = static_cast<uint32_t>(whole - half + 127) << 23;
      float first, second;
      std::memcpy(&first, &first_bits, sizeof first);
      std::memcpy(&second, &second_bits, sizeof second);
      v.at[i] = (q * r + 1.f) * first * second;
    }
    return v;
  }
};

#if defined(__x86_64__)

#define DL_AVX2 __attribute__((target("avx2,fma"), always_inline)) static inline
template <>
struct SoftmaxVec<VecAvx2> {
  using type = __m256;
  static constexpr int pair_width = 16;
  static constexpr int stream_align = 32;
  DL_AVX2 void load_pair(const float* p, type& a, type& b) {
    a = _mm256_loadu_ps(p);
    b = _mm256_loadu_ps(p + 8);
  }
  DL_AVX2 void load_pair(const bf16* p, type& a, type& b) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  template <class S>
  DL_AVX2 void load_pair_n(const S* p, int n, type& a, type& b) {
    S padded[pair_width];
    for (S& e : padded) from_float(kMinusInf, &e);
    std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(S));
    load_pair(padded, a, b);
  }
  DL_AVX2 void store_pair(float* p, type a, type b) {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
  DL_AVX2 void store_pair(bf16* p, type a, type b) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, b)); }
  template <class S>
  DL_AVX2 void store_pair_n(S* p, type a, type b, int n) {
    S padded[pair_width];
    store_pair(padded, a, b);
    std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(S));
  }
  DL_AVX2 void stream_pair(float* p, type a, type b) {
    _mm256_stream_ps(p, a);
    _mm256_stream_ps(p + 8, b);
  }
  DL_AVX2 void stream_pair(bf16* p, type a, type b) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a, b)); }
  DL_AVX2 void stream_end() { _mm_sfence(); }
  DL_AVX2 type max(type a, type b) { return _mm256_max_ps(a, b); }
  DL_AVX2 float biggest(type v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
  }
  template <Exactness exactness>
  DL_AVX2 type exp(type d) {
    const type x = _mm256_max_ps(_mm256_set1_ps(kExpFloor), d);
    const type shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(kLog2E), _mm256_set1_ps(kRoundingShift));
    const type n = _mm256_sub_ps(shifted, _mm256_set1_ps(kRoundingShift));
    type r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2High), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Low), r);
    type q;
    if constexpr (exactness != Exactness::rough) {
      q = _mm256_set1_ps(kExpFull[5]);
      for (int k = 4; k >= 0; --k) q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(kExpFull[k]));
    } else {
      q = _mm256_set1_ps(kExpRough[3]);
      for (int k = 2; k >= 0; --k) q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(kExpRough[k]));
    }
    const type e = _mm256_fmadd_ps(q, r, _mm256_set1_ps(1.f));
    // Two factors of 2: n reaches -151, where one of them would no longer have an exponent.
    const __m256i whole = _mm256_srai_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 9), 9);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(e, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
  }

 private:
  // To the nearest bf16, in the upper half of each number.
  DL_AVX2 __m256i rounded(type v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  }
  DL_AVX2 __m256i narrow(type a, type b) { return _mm256_blend_epi16(_mm256_srli_epi32(rounded(a), 16), rounded(b), 0xaa); }
};
#undef DL_AVX2

#define DL_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"), always_inline)) static inline
template <>
struct SoftmaxVec<VecAvx512> {
  using type = __m512;
  static constexpr int pair_width = 32;
  static constexpr int stream_align = 64;
  DL_AVX512 void load_pair(const float* p, type& a, type& b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + 16);
  }
  DL_AVX512 void load_pair(const bf16* p, type& a, type& b) { widen(_mm512_loadu_si512(p), a, b); }
  DL_AVX512 void load_pair_n(const float* p, int n, type& a, type& b) {
    const type none = _mm512_set1_ps(kMinusInf);
    a = _mm512_mask_loadu_ps(none, low(n), p);
    b = _mm512_mask_loadu_ps(none, high(n), p + 16);
  }
  DL_AVX512 void load_pair_n(const bf16* p, int n, type& a, type& b) {
    const __m512i none = _mm512_set1_epi16(static_cast<short>(0xff80));
    widen(_mm512_mask_loadu_epi16(none, static_cast<__mmask32>((1u << n) - 1u), p), a, b);
  }
  DL_AVX512 void store_pair(float* p, type a, type b) {
    _mm512_storeu_ps(p, a);
    _mm512_storeu_ps(p + 16, b);
  }
  DL_AVX512 void store_pair(bf16* p, type a, type b) { _mm512_storeu_si512(p, narrow(a, b)); }
  DL_AVX512 void store_pair_n(float* p, type a, type b, int n) {
    _mm512_mask_storeu_ps(p, low(n), a);
    _mm512_mask_storeu_ps(p + 16, high(n), b);
  }
  DL_AVX512 void store_pair_n(bf16* p, type a, type b, int n) {
    _mm512_mask_storeu_epi16(p, static_cast<__mmask32>((1u << n) - 1u), narrow(a, b));
  }
  DL_AVX512 void stream_pair(float* p, type a, type b) {
    _mm512_stream_ps(p, a);
    _mm512_stream_ps(p + 16, b);
  }
  DL_AVX512 void stream_pair(bf16* p, type a, type b) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow(a, b)); }
  DL_AVX512 void stream_end() { _mm_sfence(); }
  DL_AVX512 type max(type a, type b) { return _mm512_max_ps(a, b); }
  DL_AVX512 float biggest(type v) { return _mm512_reduce_max_ps(v); }
  template <Exactness exactness>
  DL_AVX512 type exp(type d) {
    const type x = _mm512_max_ps(_mm512_set1_ps(kExpFloor), d);
    const type n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(kLog2E)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    type r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2High), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Low), r);
    type q;
    if constexpr (exactness != Exactness::rough) {
      q = _mm512_set1_ps(kExpFull[5]);
      for (int k = 4; k >= 0; --k) q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(kExpFull[k]));
    } else {
      q = _mm512_set1_ps(kExpRough[3]);
      for (int k = 2; k >= 0; --k) q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(kExpRough[k]));
    }
    return _mm512_scalef_ps(_mm512_fmadd_ps(q, r, _mm512_set1_ps(1.f)), n);
  }

 private:
  DL_AVX512 __mmask16 low(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  DL_AVX512 __mmask16 high(int n) { return static_cast<__mmask16>(((1u << n) - 1u) >> 16); }
  DL_AVX512 void widen(__m512i both, type& a, type& b) {
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  // To the nearest bf16, in the upper half of each number.
  DL_AVX512 __m512i rounded(type v) { return _mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x8000)); }
  DL_AVX512 __m512i narrow(type a, type b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(rounded(a), 16), rounded(b));
  }
};

// The largest of bf16 numbers, n a positive multiple of pair_width. Where one is positive, they are in the order of their bits as
// signed integers; where none is, the order of their bits is turned round. A NaN is a possible answer.
template <>
struct Largest<VecAvx512, bf16> {
  static constexpr bool exists = true;
  DL_AVX512 float of(const bf16* p, int64_t n) {
    __m512i acc0 = _mm512_loadu_si512(p), acc1 = acc0;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
      acc0 = _mm512_max_epi16(acc0, _mm512_loadu_si512(p + i));
      acc1 = _mm512_max_epi16(acc1, _mm512_loadu_si512(p + i + 32));
    }
    if (i < n) acc0 = _mm512_max_epi16(acc0, _mm512_loadu_si512(p + i));
    // With all bits but the first flipped, the signed maximum is the unsigned minimum.
    unsigned bits = smallest(_mm512_xor_si512(_mm512_max_epi16(acc0, acc1), _mm512_set1_epi16(0x7fff))) ^ 0x7fffu;
    if (bits >= 0x8000u) {
      acc0 = acc1 = _mm512_set1_epi16(-1);
      for (i = 0; i + 64 <= n; i += 64) {
        acc0 = _mm512_min_epu16(acc0, _mm512_loadu_si512(p + i));
        acc1 = _mm512_min_epu16(acc1, _mm512_loadu_si512(p + i + 32));
      }
      if (i < n) acc0 = _mm512_min_epu16(acc0, _mm512_loadu_si512(p + i));
      bits = smallest(_mm512_min_epu16(acc0, acc1));
    }
    return to_float(bf16{static_cast<uint16_t>(bits)});
  }

 private:
  DL_AVX512 unsigned smallest(__m512i v) {
    const __m256i of_two = _mm256_min_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    const __m128i of_four = _mm_min_epu16(_mm256_castsi256_si128(of_two), _mm256_extracti128_si256(of_two, 1));
    return static_cast<unsigned>(_mm_cvtsi128_si32(_mm_minpos_epu16(of_four))) & 0xffffu;
  }
};

// factor * e^(x - max) as 2^n * table[j] * e^r, where 32 n + j is x - max in steps of ln(2) / 32 and r the rest. The 32 numbers of
// the table, with the factor in them, are in two registers. One addition brings 32 n + j into the lowest bits of s: its last five
// bits select table[j], and s << 18 adds n to the exponent and j << 18 below it, which the table has subtracted beforehand.
// full subtracts max first, which is exact where it matters; the others take x as it is: the whole part of max * log2(e) goes into
// the addition, the rest of it into the table.
template <Exactness exactness>
struct ExpTable<VecAvx512, exactness> {
  static constexpr bool exists = true;
  static constexpr bool subtracts = exactness == Exactness::full;
  using type = __m512;
  type low;
  type high;
  type minus_max;  // only when it subtracts
  type shift;
  type lowest;  // of x, or of x - max when it subtracts; below it the result would be smaller than a normal number, and is 0

  // With other numbers an exponent could overflow, s lose digits, or the digits of ln(2) / 32 not suffice. A NaN is refused too.
  DL_AVX512 bool fits(float max, float factor) {
    const float size = __builtin_fabsf(factor);
    return __builtin_fabsf(max) < (exactness == Exactness::sum ? 24.f : 1e4f) && size > 1e-18f && size < 1e18f;
  }
  DL_AVX512 ExpTable of(float max, float factor) {
    constexpr double log2_e = 0x1.71547652b82fep+0, ln2 = 0x1.62e42fefa39efp-1;
    const double whole = subtracts ? 0. : __builtin_rint(static_cast<double>(max) * log2_e);
    double scale = factor;
    if (!subtracts) scale *= __builtin_exp(whole * ln2 - static_cast<double>(max));
    if (exactness == Exactness::rough) scale *= kExpLine;
    // 2^n times the factor must not fall below 2^-124, which leaves room for the rounding of n.
    const int exponent = __builtin_ilogbf(factor);
    const double lowest = (-124. - (exponent < 0 ? exponent : 0)) * ln2;
    const __m512i below = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 18);
    const type k = _mm512_set1_ps(static_cast<float>(scale));
    const __m512i first = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(kPowers), k));
    const __m512i second = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(kPowers + 16), k));
    return {
        _mm512_castsi512_ps(_mm512_sub_epi32(first, below)),
        _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_sub_epi32(second, below), _mm512_set1_epi32(16 << 18))),
        _mm512_set1_ps(-max),
        _mm512_set1_ps(static_cast<float>(static_cast<double>(kRoundingShift) - 32. * whole)),
        _mm512_set1_ps(static_cast<float>(subtracts ? lowest : static_cast<double>(max) + lowest))};
  }

  DL_AVX512 type at(const ExpTable& t, type x) {
    type r;
    __mmask16 is_seen;
    const type power = t.split(x, r, is_seen);
    type u = r;  // e^r - 1
    if constexpr (exactness == Exactness::full) {
      const type q = _mm512_fmadd_ps(r, _mm512_set1_ps(kExpStep[1]), _mm512_set1_ps(kExpStep[0]));
      u = _mm512_fmadd_ps(_mm512_mul_ps(r, r), q, r);
    } else if constexpr (exactness == Exactness::sum) {
      u = _mm512_mul_ps(r, _mm512_fmadd_ps(r, _mm512_set1_ps(kExpStepShort[1]), _mm512_set1_ps(kExpStepShort[0])));
    }
    return _mm512_maskz_fmadd_ps(is_seen, u, power, power);
  }

 private:
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"), always_inline)) inline type split(
      type x, type& r, __mmask16& is_seen) const {
    const type d = subtracts ? _mm512_add_ps(x, minus_max) : x;
    const type s = _mm512_fmadd_ps(d, _mm512_set1_ps(kStepsOfLog2), shift);
    r = _mm512_fnmadd_ps(_mm512_sub_ps(s, shift), _mm512_set1_ps(kLn2Step), d);
    is_seen = _mm512_cmp_ps_mask(d, lowest, _CMP_NLT_UQ);
    const __m512i bits = _mm512_castps_si512(s);
    const __m512i entry = _mm512_castps_si512(_mm512_permutex2var_ps(low, bits, high));
    return _mm512_castsi512_ps(_mm512_add_epi32(entry, _mm512_slli_epi32(bits, 18)));
  }
};
#undef DL_AVX512

#endif  // __x86_64__

}  // namespace dist_llm
