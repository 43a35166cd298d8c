// Stands in for CUDA's header of this name: a number, its conversions (to nearest, ties to even) and its arithmetic, in fp32 and rounded.
#pragma once

#include "cuda_runtime.h"

namespace cuda_emulator {

inline float from_bf16(unsigned short bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

inline unsigned short to_bf16(float a) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, a);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace cuda_emulator

struct alignas(2) __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float a) : bits(cuda_emulator::to_bf16(a)) {}
  __nv_bfloat16(double a) : __nv_bfloat16(static_cast<float>(a)) {}
  __nv_bfloat16(int a) : __nv_bfloat16(static_cast<float>(a)) {}
  operator float() const { return cuda_emulator::from_bf16(bits); }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

#define DL_OPERATOR(op)                                                                                                   \
  inline __nv_bfloat16 operator op(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16(static_cast<float>(a) op static_cast<float>(b)); }
DL_OPERATOR(+)
DL_OPERATOR(-)
DL_OPERATOR(*)
DL_OPERATOR(/)
#undef DL_OPERATOR
#define DL_COMPARE(op)                                                                                                    \
  inline bool operator op(__nv_bfloat16 a, __nv_bfloat16 b) { return static_cast<float>(a) op static_cast<float>(b); }
DL_COMPARE(<)
DL_COMPARE(>)
DL_COMPARE(<=)
DL_COMPARE(>=)
DL_COMPARE(==)
DL_COMPARE(!=)
#undef DL_COMPARE
inline __nv_bfloat16 operator-(__nv_bfloat16 a) { return __nv_bfloat16(-static_cast<float>(a)); }

inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline __nv_bfloat16 __float2bfloat16(float a) { return __nv_bfloat16(a); }
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return __nv_bfloat16(a); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 out;
  out.bits = bits;
  return out;
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float a) { return {__nv_bfloat16(a), __nv_bfloat16(a)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {__nv_bfloat16(a.x), __nv_bfloat16(a.y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
inline float __low2float(__nv_bfloat162 a) { return a.x; }
inline float __high2float(__nv_bfloat162 a) { return a.y; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x + b.x, a.y + b.y}; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x * b.x, a.y * b.y}; }
inline __nv_bfloat16 __hadd(__nv_bfloat16 a, __nv_bfloat16 b) { return a + b; }
inline __nv_bfloat16 __hmul(__nv_bfloat16 a, __nv_bfloat16 b) { return a * b; }
inline __nv_bfloat16 __hmax(__nv_bfloat16 a, __nv_bfloat16 b) { return a < b ? b : a; }
inline bool __hisnan(__nv_bfloat16 a) { return std::isnan(static_cast<float>(a)); }
