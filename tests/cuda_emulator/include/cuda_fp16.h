// Stands in for CUDA's header of this name: a number, its conversions (to nearest, ties to even) and its arithmetic, in fp32 and rounded.
#pragma once

#include "cuda_runtime.h"

namespace cuda_emulator {

// Sign, 5 bits of exponent (bias 15), 10 of fraction.
inline float from_fp16(unsigned short bits) {
  const float sign = bits >> 15 ? -1.f : 1.f;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction == 0 ? sign * HUGE_VALF : __builtin_nanf("");
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

inline unsigned short to_fp16(float a) {
  const unsigned short sign = std::signbit(a) ? 0x8000 : 0;
  const float size = std::fabs(a);
  if (std::isnan(a)) return 0x7fff;
  if (size >= 65520.f) return sign | 0x7c00;  // from the middle between the largest number and the next power of two on
  if (size < 6.103515625e-05f) return sign | static_cast<unsigned short>(std::nearbyint(std::ldexp(static_cast<double>(size), 24)));
  int exponent;
  const double fraction = std::frexp(static_cast<double>(size), &exponent);  // [1/2, 1)
  const int digits = static_cast<int>(std::nearbyint(fraction * 2048.));     // 1024 ... 2048; 2048 carries into the exponent
  return sign | static_cast<unsigned short>(((exponent + 14) << 10) + digits - 1024);
}

}  // namespace cuda_emulator

struct alignas(2) __half {
  unsigned short bits;
  __half() = default;
  __half(float a) : bits(cuda_emulator::to_fp16(a)) {}
  __half(double a) : __half(static_cast<float>(a)) {}
  __half(int a) : __half(static_cast<float>(a)) {}
  operator float() const { return cuda_emulator::from_fp16(bits); }
};

struct alignas(4) __half2 {
  __half x, y;
};

#define DL_OPERATOR(op)                                                                                                   \
  inline __half operator op(__half a, __half b) { return __half(static_cast<float>(a) op static_cast<float>(b)); }
DL_OPERATOR(+)
DL_OPERATOR(-)
DL_OPERATOR(*)
DL_OPERATOR(/)
#undef DL_OPERATOR
#define DL_COMPARE(op)                                                                                                    \
  inline bool operator op(__half a, __half b) { return static_cast<float>(a) op static_cast<float>(b); }
DL_COMPARE(<)
DL_COMPARE(>)
DL_COMPARE(<=)
DL_COMPARE(>=)
DL_COMPARE(==)
DL_COMPARE(!=)
#undef DL_COMPARE
inline __half operator-(__half a) { return __half(-static_cast<float>(a)); }

inline float __half2float(__half a) { return a; }
inline __half __float2half(float a) { return __half(a); }
inline __half __float2half_rn(float a) { return __half(a); }
inline unsigned short __half_as_ushort(__half a) { return a.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half out;
  out.bits = bits;
  return out;
}
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float2half2_rn(float a) { return {__half(a), __half(a)}; }
inline __half2 __float22half2_rn(float2 a) { return {__half(a.x), __half(a.y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline float __low2float(__half2 a) { return a.x; }
inline float __high2float(__half2 a) { return a.y; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline __half2 __hadd2(__half2 a, __half2 b) { return {a.x + b.x, a.y + b.y}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {a.x * b.x, a.y * b.y}; }
inline __half __hadd(__half a, __half b) { return a + b; }
inline __half __hmul(__half a, __half b) { return a * b; }
inline __half __hmax(__half a, __half b) { return a < b ? b : a; }
inline bool __hisnan(__half a) { return std::isnan(static_cast<float>(a)); }
