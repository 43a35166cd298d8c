// Kernels with one fault each, and without: test_cuda_emulated.py sees that the emulator finds every fault and nothing else.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/cuda_tensors.h"
#include "common/mma.h"

namespace dist_llm {
namespace {

constexpr int kThreads = 96;

enum Fault {
  none,
  no_barrier,
  barrier_in_a_branch,
  barrier_after_leaving,
  two_barriers,
  index_past_array,
  past_dynamic_shared,
  nobody_wrote,
  misaligned,
  lane_left_out,
  lanes_elsewhere,
  no_warp_barrier,
  copy_not_waited_for,
  copy_without_barrier,
  too_much_shared,
  order_of_blocks,
  result_not_written,
  empty_grid,
  copy_left_over,
  past_result,
  before_argument,
  no_barrier_in_global_memory,
};

// Reverses 96 numbers, by one detour a fault.
__global__ void reverse_kernel(const float* in_, float* out_, int fault) {
  __shared__ float numbers[kThreads];
  __shared__ __align__(16) float packs[kThreads], others[4];
  DL_DYNAMIC_SHARED(float, dynamic);
  const int i = static_cast<int>(threadIdx.x);
  if (fault == nobody_wrote && i == 7) {
    __syncthreads();
  } else {
    numbers[i] = in_[i];
    if (fault != no_barrier) __syncthreads();
  }
  float value = numbers[kThreads - 1 - i];
  switch (fault) {
    case barrier_in_a_branch:
      if (i < 32) __syncthreads();
      break;
    case barrier_after_leaving:
      if (i == 5) return;
      __syncthreads();
      break;
    case two_barriers:
      if (i % 2 == 0) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case index_past_array:
      value = numbers[kThreads - i];
      break;
    case past_dynamic_shared:
      dynamic[i + 1] = value;
      break;
    case misaligned:
      packs[i] = value;
      __syncthreads();
      load_floats<4>(packs + 1, reinterpret_cast<float(&)[4]>(others));
      break;
    case lane_left_out:
      if (i % 32 != 3) value = __shfl_sync(0xffffffffu, value, i % 32);
      break;
    case lanes_elsewhere:
      if (i % 32 < 16) {
        value = __shfl_xor_sync(0xffffffffu, value, 0);
      } else {
        value = __shfl_down_sync(0xffffffffu, value, 0);
      }
      break;
    case no_warp_barrier:
      packs[i] = value;
      value = packs[i ^ 1];
      break;
    case copy_not_waited_for:
    case copy_without_barrier:
    case copy_left_over:
      if (i < kThreads / 4) copy_async(packs + 4 * i, in_ + 4 * i, true);
      commit_copies();
      if (fault == copy_without_barrier) wait_for_copies<0>();
      if (fault == copy_left_over) break;
      if (fault == copy_not_waited_for) __syncthreads();
      value = packs[i];
      break;
    case past_result:
      if (i == kThreads - 1) out_[kThreads] = value;
      break;
    case before_argument:
      value = in_[i - 1];
      break;
    case no_barrier_in_global_memory:
      out_[i] = value;
      value = out_[kThreads - 1 - i];
      break;
    default:
      break;
  }
  if (fault != result_not_written || i != 11) out_[i] = value;
}

// Every block adds to what the others left.
__global__ void order_kernel(float* out_) { out_[threadIdx.x] = out_[threadIdx.x] * 0.5f + static_cast<float>(blockIdx.x); }

Tensor reverse(const Tensor& x, int64_t fault) {
  Tensor result = torch::stable::empty_like(x);
  if (fault == order_of_blocks) {
    DL_LAUNCH(reverse_kernel, 1, kThreads, 0, current_stream(0), in<float>(x), out<float>(result), 0);
    DL_LAUNCH(order_kernel, 7, kThreads, 0, current_stream(0), out<float>(result));
    return result;
  }
  const int bytes = fault == too_much_shared ? 64 * 1024 : fault == past_dynamic_shared ? kThreads * 4 : 0;
  DL_LAUNCH(
      reverse_kernel, fault == empty_grid ? 0 : 1, kThreads, bytes, current_stream(0), in<float>(x), out<float>(result),
      static_cast<int>(fault));
  return result;
}

// 16 x 16 times 16 x 8, fragments by ldmatrix.
template <class S>
__global__ void product_kernel(const S* a, const S* b, float* c) {
  __shared__ __align__(16) S left[16 * 16], right[16 * 16];
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) {
    left[i] = a[i];
    right[i] = i % 16 < 8 ? b[i / 16 * 8 + i % 16] : S(0.f);
  }
  __syncwarp();
  float sums[4] = {};
  uint32_t of_left[4], of_right[4];
  load_matrices<false>(of_left, left + lane % 16 * 16 + lane / 16 * 8);
  load_matrices<true>(of_right, right + lane % 16 * 16 + lane / 16 * 8);
  mma<S>(sums, of_left, {of_right[0], of_right[1]});
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

Tensor product(const Tensor& a, const Tensor& b) {
  Tensor c = torch::stable::new_empty(a, {16, 8}, ScalarType::Float);
  if (a.scalar_type() == ScalarType::Half) {
    DL_LAUNCH(product_kernel<__half>, 1, 32, 0, current_stream(0), in<__half>(a), in<__half>(b), out<float>(c));
  } else {
    DL_LAUNCH(product_kernel<__nv_bfloat16>, 1, 32, 0, current_stream(0), in<__nv_bfloat16>(a), in<__nv_bfloat16>(b), out<float>(c));
  }
  return c;
}

__global__ void round_kernel(const float* x, __nv_bfloat16* brain, __half* half, float* back, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    from_float(x[i], brain + i);
    from_float(x[i], half + i);
    back[i] = to_float(half[i]);
  }
}

std::tuple<Tensor, Tensor, Tensor> rounded(const Tensor& x) {
  Tensor brain = torch::stable::new_empty(x, {x.numel()}, ScalarType::BFloat16);
  Tensor half = torch::stable::new_empty(x, {x.numel()}, ScalarType::Half);
  Tensor back = torch::stable::new_empty(x, {x.numel()}, ScalarType::Float);
  DL_LAUNCH(round_kernel, 1, 64, 0, current_stream(0), in<float>(x), out<__nv_bfloat16>(brain), out<__half>(half), out<float>(back), x.numel());
  return {brain, half, back};
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm_faults, DL_DEVICE_KEY, m) {
  m.impl("reverse", TORCH_BOX(&dist_llm::reverse));
  m.impl("product", TORCH_BOX(&dist_llm::product));
  m.impl("rounded", TORCH_BOX(&dist_llm::rounded));
}
