// Stands in for CUDA's header of this name: what kernels and their launchers in csrc/ use of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "cuda_emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define DL_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define DL_NOT_SEEN __attribute__((noinline, no_sanitize_thread))

constexpr int warpSize = 32;

// Host.

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrComputeCapabilityMajor };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid value"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) cuda_emulator::allow_shared(reinterpret_cast<const void*>(kernel), value);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 3;  // few and odd, so that grids that are made for it loop
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 163 * 1024;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(p, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

namespace cuda_emulator {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA emulation: ") + cudaGetErrorString(error));
}

}  // namespace cuda_emulator

// Vectors.

#define DL_VECTOR(type, name, n)                                            \
  struct alignas(sizeof(type) * (n)) name##2 { type x, y; };                \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }
#define DL_VECTOR4(type, name)                                              \
  struct alignas(sizeof(type) * 4 > 16 ? 16 : sizeof(type) * 4) name##4 { type x, y, z, w; }; \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
DL_VECTOR(float, float, 2)
DL_VECTOR(int, int, 2)
DL_VECTOR(unsigned, uint, 2)
DL_VECTOR(double, double, 2)
DL_VECTOR(long long, longlong, 2)
DL_VECTOR4(float, float)
DL_VECTOR4(int, int)
DL_VECTOR4(unsigned, uint)
DL_VECTOR4(unsigned char, uchar)
#undef DL_VECTOR
#undef DL_VECTOR4

// Barriers.

inline void __syncthreads(DL_HERE) { cuda_emulator::meet_block(0, {file, line}); }
inline int __syncthreads_count(int predicate, DL_HERE) { return cuda_emulator::meet_block(predicate, {file, line}); }
inline int __syncthreads_or(int predicate, DL_HERE) { return cuda_emulator::meet_block(predicate, {file, line}) != 0; }
inline int __syncthreads_and(int predicate, DL_HERE) { return cuda_emulator::meet_block(!predicate, {file, line}) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu, DL_HERE) { cuda_emulator::sync_warp(mask, {file, line}); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Warp functions.

namespace cuda_emulator {

template <class T>
struct Shuffle {
  T value, result;
  int source;  // lane of the warp, or -1: the lane's own value
};

template <class T>
T shuffle(const char* function, unsigned mask, T value, int source, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  Shuffle<T> mine{value, value, source};
  meet_warp(
      function, mask, &mine,
      [](void* const* lanes, unsigned met) {
        for (unsigned lane = 0; lane < 32; ++lane) {
          if (!(met >> lane & 1)) continue;
          Shuffle<T>& to = *static_cast<Shuffle<T>*>(lanes[lane]);
          // What a lane outside the mask would give is undefined: bits that nobody expects.
          if (to.source >= 0 && (met >> to.source & 1)) {
            to.result = static_cast<Shuffle<T>*>(lanes[to.source])->value;
          } else if (to.source >= 0) {
            std::memset(static_cast<void*>(&to.result), 0xff, sizeof(T));
          }
        }
      },
      place);
  return mine.result;
}

// The source lane, or -1 where it leaves the group of `width` lanes.
inline int lane_up(int delta, int width) {
  const int lane = static_cast<int>(lane_of_thread());
  return lane % width >= delta ? lane - delta : -1;
}
inline int lane_down(int delta, int width) {
  const int lane = static_cast<int>(lane_of_thread());
  return lane % width + delta < width ? lane + delta : -1;
}
inline int lane_xor(int bits, int width) {
  const int lane = static_cast<int>(lane_of_thread()), other = lane ^ bits;
  return other < (lane / width + 1) * width ? other : -1;
}
inline int lane_at(int source, int width) {
  const int lane = static_cast<int>(lane_of_thread());
  return lane / width * width + (source % width + width) % width;
}

template <class T>
struct Reduce {
  T value, result;
};

template <class T, class F>
T reduce(const char* function, unsigned mask, T value, F, Place place) {
  Reduce<T> mine{value, value};
  meet_warp(
      function, mask, &mine,
      [](void* const* lanes, unsigned met) {
        bool is_first = true;
        T total{};
        for (unsigned lane = 0; lane < 32; ++lane) {
          if (!(met >> lane & 1)) continue;
          const T v = static_cast<Reduce<T>*>(lanes[lane])->value;
          total = is_first ? v : F::of(total, v);
          is_first = false;
        }
        for (unsigned lane = 0; lane < 32; ++lane) {
          if (met >> lane & 1) static_cast<Reduce<T>*>(lanes[lane])->result = total;
        }
      },
      place);
  return mine.result;
}

struct Or {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct And {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Add {
  template <class T>
  static T of(T a, T b) {
    return a + b;
  }
};
struct Min {
  template <class T>
  static T of(T a, T b) {
    return b < a ? b : a;
  }
};
struct Max {
  template <class T>
  static T of(T a, T b) {
    return a < b ? b : a;
  }
};

template <class T>
unsigned match_any(unsigned mask, T value, Place place) {
  struct Match {
    T value;
    unsigned result;
  } mine{value, 0};
  meet_warp(
      "__match_any_sync", mask, &mine,
      [](void* const* lanes, unsigned met) {
        for (unsigned a = 0; a < 32; ++a) {
          if (!(met >> a & 1)) continue;
          Match& to = *static_cast<Match*>(lanes[a]);
          for (unsigned b = 0; b < 32; ++b) {
            if ((met >> b & 1) && static_cast<Match*>(lanes[b])->value == to.value) to.result |= 1u << b;
          }
        }
      },
      place);
  return mine.result;
}

}  // namespace cuda_emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, DL_HERE) {
  return cuda_emulator::shuffle("__shfl_sync", mask, value, cuda_emulator::lane_at(source, width), {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, DL_HERE) {
  return cuda_emulator::shuffle("__shfl_up_sync", mask, value, cuda_emulator::lane_up(static_cast<int>(delta), width), {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, DL_HERE) {
  return cuda_emulator::shuffle("__shfl_down_sync", mask, value, cuda_emulator::lane_down(static_cast<int>(delta), width), {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, DL_HERE) {
  return cuda_emulator::shuffle("__shfl_xor_sync", mask, value, cuda_emulator::lane_xor(bits, width), {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, DL_HERE) {
  const unsigned bit = predicate != 0 ? 1u << cuda_emulator::lane_of_thread() : 0u;
  return cuda_emulator::reduce("__ballot_sync", mask, bit, cuda_emulator::Or{}, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, DL_HERE) {
  return cuda_emulator::reduce("__any_sync", mask, unsigned{predicate != 0}, cuda_emulator::Or{}, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, DL_HERE) {
  return cuda_emulator::reduce("__all_sync", mask, unsigned{predicate != 0}, cuda_emulator::And{}, {file, line}) != 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, DL_HERE) {
  return cuda_emulator::match_any(mask, value, {file, line});
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, DL_HERE) {
  return cuda_emulator::reduce("__reduce_add_sync", mask, value, cuda_emulator::Add{}, {file, line});
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, DL_HERE) {
  return cuda_emulator::reduce("__reduce_min_sync", mask, value, cuda_emulator::Min{}, {file, line});
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, DL_HERE) {
  return cuda_emulator::reduce("__reduce_max_sync", mask, value, cuda_emulator::Max{}, {file, line});
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, DL_HERE) {
  return cuda_emulator::reduce("__reduce_or_sync", mask, value, cuda_emulator::Or{}, {file, line});
}

// Atomics of whole numbers; there are none for floats on purpose: their sums would depend on the order.

template <class T>
DL_NOT_SEEN T atomicAdd(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "no atomics on floats: the sum would depend on the order");
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
DL_NOT_SEEN T atomicMax(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  *p = old < value ? value : old;
  return old;
}
template <class T>
DL_NOT_SEEN T atomicMin(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  *p = value < old ? value : old;
  return old;
}
template <class T>
DL_NOT_SEEN T atomicOr(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  *p = old | value;
  return old;
}
template <class T>
DL_NOT_SEEN T atomicExch(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  *p = value;
  return old;
}
template <class T>
DL_NOT_SEEN T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

// Arithmetic. The fast functions are computed exactly here: their errors (CUDA's table of intrinsics) do not show.

inline float __int_as_float(int a) { return __builtin_bit_cast(float, a); }
inline float __uint_as_float(unsigned a) { return __builtin_bit_cast(float, a); }
inline int __float_as_int(float a) { return __builtin_bit_cast(int, a); }
inline unsigned __float_as_uint(float a) { return __builtin_bit_cast(unsigned, a); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline unsigned __brev(unsigned a) {
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= (a >> i & 1u) << (31 - i);
  return out;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline float rsqrtf(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline float __frsqrt_rn(float a) { return rsqrtf(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __exp10f(float a) { return powf(10.f, a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline void __sincosf(float a, float* s, float* c) { *s = sinf(a), *c = cosf(a); }
inline float __tanhf(float a) { return tanhf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __saturatef(float a) { return a >= 0.f ? (a < 1.f ? a : 1.f) : 0.f; }
inline int __float2int_rn(float a) { return static_cast<int>(nearbyintf(a)); }
inline int __float2int_rz(float a) { return static_cast<int>(a); }
inline int __float2int_rd(float a) { return static_cast<int>(floorf(a)); }
inline unsigned __float2uint_rz(float a) { return static_cast<unsigned>(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline void __trap() { cuda_emulator::fail("__trap", {nullptr, 0}); }
inline size_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<size_t>(p); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> value) {
  *p = value;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> value) {
  *p = value;
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
