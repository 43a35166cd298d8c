// What every CUDA entry point needs: launches, the current stream, 16-byte accesses, sums over a block, fp32 from any storage type.
//
// A kernel written with these macros also runs without a GPU: with DL_EMULATE_CUDA a C++ compiler builds the same file for CPU tensors
// (tests/cuda_emulator/README.md).
//
//   DL_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)   launches, and throws when that failed. A kernel with commas
//                                        between its template arguments goes into a variable first.
//   DL_DYNAMIC_SHARED(type, name);       in a kernel: `type* name` points to the dynamic shared memory, aligned to 128 bytes.
//   DL_DEVICE_KEY                        CUDA; for STABLE_TORCH_LIBRARY_IMPL(dist_llm, DL_DEVICE_KEY, m).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#if defined(DL_EMULATE_CUDA)

#define DL_DEVICE_KEY CPU
#define DL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::cuda_emulator::launch(#kernel, __FILE__, __LINE__, (grid), (block), (shared_bytes), (stream), (kernel), __VA_ARGS__)
#define DL_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::cuda_emulator::dynamic_shared())
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(...) ::cuda_emulator::check(__VA_ARGS__)

#else

#define DL_DEVICE_KEY CUDA
#define DL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                  \
  do {                                                                             \
    (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__);          \
    STD_CUDA_KERNEL_LAUNCH_CHECK();                                                \
  } while (false)
// One array of bytes for all kernels: arrays of different types under one name would clash between instantiations.
#define DL_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(128) unsigned char dl_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dl_dynamic_shared)

#endif

namespace dist_llm {

#if defined(DL_EMULATE_CUDA)

struct DeviceGuard {
  explicit DeviceGuard(int32_t device_index) { static_cast<void>(device_index); }
};

inline cudaStream_t current_stream(int32_t device_index) {
  static_cast<void>(device_index);
  return nullptr;
}

#else

using torch::stable::accelerator::DeviceGuard;

// torch's current stream of a device: kernels launched on it keep the order of the caller's work.
inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

#endif

// Lets a kernel have up to `bytes` of dynamic shared memory: more than 48 KiB has to be asked for, and chips differ in what they have
// (KiB of a block: sm_80 163, sm_86, sm_89 and sm_120 99, sm_90 and sm_100 227). `instead`: what to do on one that has less.
template <class Kernel>
void allow_dynamic_shared(Kernel* kernel, int bytes, const char* instead = "take another implementation of the op in the section kernels") {
  int device = 0, most = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_TORCH_CHECK(
      bytes <= most, "this kernel needs ", bytes, " bytes of shared memory in a block, and this GPU has ", most, "; ", instead);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

__device__ inline float to_float(float a) { return a; }
__device__ inline float to_float(__half a) { return __half2float(a); }
__device__ inline float to_float(__nv_bfloat16 a) { return __bfloat162float(a); }
__device__ inline void from_float(float value, float* p) { *p = value; }
__device__ inline void from_float(float value, __half* p) { *p = __float2half_rn(value); }
__device__ inline void from_float(float value, __nv_bfloat16* p) { *p = __float2bfloat16_rn(value); }

// N neighbouring elements that are loaded and stored together.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <int N, class T>
__device__ inline void load_floats(const T* p, float (&out)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(pack.at[i]);
}

template <int N, class T>
__device__ inline void store_floats(T* p, const float (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) from_float(values[i], &pack.at[i]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

inline bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// The sum over all threads of a block, given to all of them, always in the same order. `scratch` holds 32 numbers in shared
// memory; blockDim.x is a multiple of 32. All threads of the block must call it.
__device__ inline float block_sum(float value, float* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  __syncthreads();  // the previous sum may still be read
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = lane < num_warps ? scratch[lane] : 0.f;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

}  // namespace dist_llm
