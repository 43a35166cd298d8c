// Rows sorted by expert and brought back, on CUDA; the contract is in moe.h.
//
// NOT YET RUN ON A GPU: this file compiles for sm_80 and sm_90a (tools/compile_cuda.py) and runs in the emulator (tests/cuda_emulator); no
// number in the docs comes from it.
//
// Sort      a stable counting sort. A block takes a stretch of slots, each of its warps a part of that, 32 slots at a time in order:
//           lanes with equal experts find one another, the lowest of them counts for all. count_kernel counts by block,
//           parts_kernel (a warp an expert) adds up the blocks before each, offsets_kernel (one warp) the experts before each, and
//           scatter_kernel counts again, by warp, and gives every slot its row. Slots of no expert are one expert more, the last.
//           No float is added and no atomic used: the rows are where they must be.
// Rows      copy_kernel and combine_kernel: a block for a token, packs of 16 bytes where width and pointers allow. spread_kernel: a
//           block for a row, since each weight's gradient is one sum over one row.
// Bound     by memory, that of the rows: permute reads x and writes rows, unpermute the reverse; its backward reads dout and rows
//           and writes drows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/cuda_launch.h"
#include "common/cuda_tensors.h"
#include "moe/moe.h"

namespace dist_llm {
namespace {

using moe::PermuteShape;

constexpr int kMaxThreads = 1024;
constexpr int64_t kWarps = 8;
constexpr int64_t kSlotsPerBlock = 2048;
constexpr int64_t kMaxParts = 512;
constexpr int64_t kMaxSharedBytes = 96 * 1024;  // opt-in shared memory that sm_80 and all later chips of this line have
constexpr unsigned kRestBlocks = 256;
constexpr unsigned kAll = 0xffffffffu;

// The stretch of slots of each block and warp.
struct Stretch {
  int64_t slots;
  int64_t per_block;  // a multiple of 32 * warps
};

__device__ inline int bin_of(int32_t expert, int num_experts) { return expert < 0 || expert >= num_experts ? num_experts : expert; }

// Adds to `bins`, shared memory of this warp, its slots of each expert.
__device__ inline void count_of_warp(const int32_t* experts, int num_experts, int64_t begin, int64_t end, int32_t* bins) {
  const int lane = threadIdx.x % 32;
  for (int b = lane; b <= num_experts; b += 32) bins[b] = 0;
  __syncwarp();
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t slot = first + lane;
    const int bin = slot < end ? bin_of(experts[slot], num_experts) : -1;
    const unsigned equal = __match_any_sync(kAll, bin);
    if (bin >= 0 && lane == __ffs(equal) - 1) bins[bin] += __popc(equal);
    __syncwarp();
  }
}

__device__ inline void stretch_of_warp(const Stretch& stretch, int64_t& begin, int64_t& end) {
  const int64_t per_warp = stretch.per_block / (blockDim.x / 32);
  begin = min(stretch.slots, static_cast<int64_t>(blockIdx.x) * stretch.per_block + threadIdx.x / 32 * per_warp);
  end = min(stretch.slots, begin + per_warp);
}

// before[bin][block] = slots of that expert in the block.
__global__ void count_kernel(const int32_t* __restrict__ experts, int num_experts, Stretch stretch, int32_t* __restrict__ before) {
  DL_DYNAMIC_SHARED(int32_t, bins_of_warps);
  const int num_bins = num_experts + 1, warps = blockDim.x / 32;
  int64_t begin, end;
  stretch_of_warp(stretch, begin, end);
  count_of_warp(experts, num_experts, begin, end, bins_of_warps + threadIdx.x / 32 * num_bins);
  __syncthreads();
  for (int b = threadIdx.x; b < num_bins; b += blockDim.x) {
    int32_t sum = 0;
    for (int w = 0; w < warps; ++w) sum += bins_of_warps[w * num_bins + b];
    before[static_cast<int64_t>(b) * gridDim.x + blockIdx.x] = sum;
  }
}

// Replaces each of n numbers by the sum of those before it; returns the sum of all. One warp; `write` may be where `read` is.
__device__ inline int32_t add_up(const int32_t* read, int32_t* write, int n) {
  const int lane = threadIdx.x;
  int32_t carry = 0;
  for (int first = 0; first < n; first += 32) {
    const int32_t here = first + lane < n ? read[first + lane] : 0;
    int32_t sum = here;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int32_t other = __shfl_up_sync(kAll, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (first + lane < n) write[first + lane] = carry + sum - here;
    carry += __shfl_sync(kAll, sum, 31);
  }
  return carry;
}

// before[bin][block] becomes the slots of that expert in the blocks before it; totals[bin], those in all.
__global__ void parts_kernel(int32_t* before, int parts, int32_t* __restrict__ totals) {
  int32_t* mine = before + static_cast<int64_t>(blockIdx.x) * parts;
  const int32_t total = add_up(mine, mine, parts);
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

__global__ void offsets_kernel(
    const int32_t* __restrict__ totals, int num_experts, int32_t* __restrict__ counts, int32_t* __restrict__ offsets) {
  add_up(totals, offsets, num_experts + 1);
  for (int e = threadIdx.x; e < num_experts; e += 32) counts[e] = totals[e];
}

__global__ void scatter_kernel(
    const int32_t* __restrict__ experts, int num_experts, Stretch stretch, const int32_t* __restrict__ before,
    const int32_t* __restrict__ offsets, int32_t* __restrict__ source, int32_t* __restrict__ row_of_slot) {
  DL_DYNAMIC_SHARED(int32_t, bins_of_warps);
  const int num_bins = num_experts + 1, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  int32_t* next = bins_of_warps + threadIdx.x / 32 * num_bins;
  int64_t begin, end;
  stretch_of_warp(stretch, begin, end);
  count_of_warp(experts, num_experts, begin, end, next);
  __syncthreads();
  // From the counts of the warps to the first row of each.
  for (int b = threadIdx.x; b < num_bins; b += blockDim.x) {
    int32_t row = offsets[b] + before[static_cast<int64_t>(b) * gridDim.x + blockIdx.x];
    for (int w = 0; w < warps; ++w) {
      const int32_t here = bins_of_warps[w * num_bins + b];
      bins_of_warps[w * num_bins + b] = row;
      row += here;
    }
  }
  __syncthreads();
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t slot = first + lane;
    const int bin = slot < end ? bin_of(experts[slot], num_experts) : -1;
    const unsigned equal = __match_any_sync(kAll, bin);
    const int32_t row = bin >= 0 ? next[bin] + __popc(equal & ((1u << lane) - 1u)) : 0;
    __syncwarp();
    if (bin >= 0 && lane == __ffs(equal) - 1) next[bin] += __popc(equal);
    __syncwarp();
    if (bin < 0) continue;  // the last round: all lanes leave the loop after it
    source[row] = bin == num_experts ? -1 : static_cast<int32_t>(slot);
    row_of_slot[slot] = row;
  }
}

template <int N, class S>
__global__ void __launch_bounds__(kMaxThreads) copy_kernel(
    const S* __restrict__ x, const int32_t* __restrict__ experts, int num_experts, const int32_t* __restrict__ row_of_slot,
    S* __restrict__ rows, int64_t top_k, int64_t width) {
  const int64_t token = blockIdx.x;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < width; i += static_cast<int64_t>(blockDim.x) * N) {
    const Pack<S, N> pack = *reinterpret_cast<const Pack<S, N>*>(x + token * width + i);
    for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
      S* to = rows + row_of_slot[slot] * width + i;
      if (bin_of(experts[slot], num_experts) < num_experts) {
        *reinterpret_cast<Pack<S, N>*>(to) = pack;
      } else {
        const float zeros[N] = {};
        store_floats<N>(to, zeros);
      }
    }
  }
}

// row_of_slot, all -1 before, becomes the inverse of source.
__global__ void invert_kernel(const int32_t* __restrict__ source, int32_t* __restrict__ row_of_slot, int64_t slots) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= slots) return;
  const int32_t slot = source[row];
  if (slot >= 0 && slot < slots) row_of_slot[slot] = static_cast<int32_t>(row);
}

template <int N, class S>
__global__ void __launch_bounds__(kMaxThreads) combine_kernel(
    const S* __restrict__ rows, const int32_t* __restrict__ row_of_slot, const float* __restrict__ weights, S* __restrict__ result,
    int64_t top_k, int64_t width) {
  const int64_t token = blockIdx.x;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < width; i += static_cast<int64_t>(blockDim.x) * N) {
    float sum[N] = {};
    for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
      const int64_t row = row_of_slot[slot];
      if (row < 0) continue;
      const float weight = weights == nullptr ? 1.f : weights[slot];
      float value[N];
      load_floats<N>(rows + row * width + i, value);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += weight * value[j];
    }
    store_floats<N>(result + token * width + i, sum);
  }
}

template <int N, class S>
__global__ void __launch_bounds__(kMaxThreads) spread_kernel(
    const S* __restrict__ dout, const S* __restrict__ rows, const int32_t* __restrict__ source, const float* __restrict__ weights,
    S* __restrict__ drows, float* __restrict__ dweights, int64_t slots, int64_t top_k, int64_t width) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  const int32_t slot = source[row];
  const bool has_slot = slot >= 0 && slot < slots;
  const float weight = has_slot ? (weights == nullptr ? 1.f : weights[slot]) : 0.f;
  const S* arriving = dout + (has_slot ? slot / top_k : 0) * width;
  float along_row = 0.f;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < width; i += static_cast<int64_t>(blockDim.x) * N) {
    float g[N] = {};
    if (has_slot) load_floats<N>(arriving + i, g);
    if (has_slot && rows != nullptr) {
      float value[N];
      load_floats<N>(rows + row * width + i, value);
#pragma unroll
      for (int j = 0; j < N; ++j) along_row += g[j] * value[j];
    }
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] *= weight;
    store_floats<N>(drows + row * width + i, g);
  }
  if (rows == nullptr) return;
  along_row = block_sum(along_row, scratch);
  if (threadIdx.x == 0 && has_slot) dweights[slot] = along_row;
}

template <class S>
__global__ void __launch_bounds__(kMaxThreads) zero_rest_kernel(
    S* __restrict__ rows, const int32_t* __restrict__ counts, int groups, int64_t num_rows, int64_t width) {
  __shared__ int64_t shared_first[1];
  if (threadIdx.x < 32) {
    int64_t sum = 0;
    for (int g = threadIdx.x; g < groups; g += 32) sum += counts[g];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
    if (threadIdx.x == 0) shared_first[0] = sum;
  }
  __syncthreads();
  for (int64_t row = shared_first[0] + blockIdx.x; row < num_rows; row += gridDim.x) {
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) from_float(0.f, rows + row * width + i);
  }
}

// Threads for a row of `width` elements in packs of `pack`: whole warps, at most kMaxThreads.
unsigned threads_for(int64_t width, int pack) {
  const int64_t packs = (width + pack - 1) / pack;
  return static_cast<unsigned>(std::min<int64_t>(kMaxThreads, (packs + 31) / 32 * 32));
}

// The row of each slot, -1 where it has none.
Tensor rows_of_slots(const Tensor& source, cudaStream_t stream) {
  const int64_t slots = source.numel();
  Tensor row_of_slot = torch::stable::new_empty(source, {slots});
  if (slots == 0) return row_of_slot;
  STD_CUDA_CHECK(cudaMemsetAsync(out<int32_t>(row_of_slot), 0xff, static_cast<size_t>(slots) * sizeof(int32_t), stream));
  const unsigned threads = 256;
  const unsigned blocks = static_cast<unsigned>((slots + threads - 1) / threads);
  DL_LAUNCH(invert_kernel, blocks, threads, 0, stream, in<int32_t>(source), out<int32_t>(row_of_slot), slots);
  return row_of_slot;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_permute_cuda(const Tensor& x, const Tensor& experts, int64_t num_experts) {
  const PermuteShape shape = moe::check_permute(x, experts, num_experts);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x.get_device_index());
  const int64_t num_bins = num_experts + 1, slots = shape.slots();
  const int64_t warps = std::min(kWarps, kMaxSharedBytes / (num_bins * 4));
  STD_TORCH_CHECK(warps >= 1, "num_experts (", num_experts, ") is more than the shared memory of a block holds");
  // As many slots for each block that there are at most kMaxParts blocks, and whole rounds of its warps.
  const int64_t round = 32 * warps;
  const int64_t wanted = std::max(kSlotsPerBlock, (slots + kMaxParts - 1) / kMaxParts);
  const Stretch stretch{slots, (wanted + round - 1) / round * round};
  const int64_t parts = std::max<int64_t>(1, (slots + stretch.per_block - 1) / stretch.per_block);

  Tensor rows = torch::stable::new_empty(x, {slots, shape.width});
  Tensor source = torch::stable::new_empty(experts, {slots});
  Tensor counts = torch::stable::new_empty(experts, {num_experts});
  Tensor offsets = torch::stable::new_empty(experts, {num_bins});
  Tensor row_of_slot = torch::stable::new_empty(experts, {slots});
  Tensor before = torch::stable::new_empty(experts, {num_bins, parts});
  Tensor totals = torch::stable::new_empty(experts, {num_bins});

  const int bins = static_cast<int>(num_experts);
  const unsigned blocks = static_cast<unsigned>(parts), threads = static_cast<unsigned>(round);
  const size_t shared_bytes = static_cast<size_t>(warps * num_bins) * sizeof(int32_t);
  allow_dynamic_shared(count_kernel, kMaxSharedBytes);
  allow_dynamic_shared(scatter_kernel, kMaxSharedBytes);
  DL_LAUNCH(count_kernel, blocks, threads, shared_bytes, stream, in<int32_t>(experts), bins, stretch, out<int32_t>(before));
  DL_LAUNCH(
      parts_kernel, static_cast<unsigned>(num_bins), 32, 0, stream, out<int32_t>(before), static_cast<int>(parts), out<int32_t>(totals));
  DL_LAUNCH(offsets_kernel, 1, 32, 0, stream, in<int32_t>(totals), bins, out<int32_t>(counts), out<int32_t>(offsets));
  if (slots == 0) return {rows, source, counts, offsets};
  DL_LAUNCH(
      scatter_kernel, blocks, threads, shared_bytes, stream, in<int32_t>(experts), bins, stretch, in<int32_t>(before), in<int32_t>(offsets),
      out<int32_t>(source), out<int32_t>(row_of_slot));
  with_type(x, "moe_permute", [&](auto s) {
    using S = decltype(s);
    constexpr int kPack = 16 / sizeof(S);
    const bool packs = shape.width % kPack == 0 && is_aligned(in<S>(x), 16);
    const auto kernel = packs ? copy_kernel<kPack, S> : copy_kernel<1, S>;
    DL_LAUNCH(
        kernel, static_cast<unsigned>(shape.tokens), threads_for(shape.width, packs ? kPack : 1), 0, stream, in<S>(x),
        in<int32_t>(experts), bins, in<int32_t>(row_of_slot), out<S>(rows), shape.top_k, shape.width);
  });
  return {rows, source, counts, offsets};
}

Tensor moe_unpermute_cuda(const Tensor& rows, const Tensor& source, const std::optional<Tensor>& weights, int64_t top_k) {
  const PermuteShape shape = moe::check_unpermute(rows, "rows", true, source, weights, top_k);
  const DeviceGuard guard(rows.get_device_index());
  const cudaStream_t stream = current_stream(rows.get_device_index());
  Tensor result = torch::stable::new_empty(rows, {shape.tokens, shape.width});
  if (shape.tokens == 0) return result;
  const Tensor row_of_slot = rows_of_slots(source, stream);
  with_type(rows, "moe_unpermute", [&](auto s) {
    using S = decltype(s);
    constexpr int kPack = 16 / sizeof(S);
    const bool packs = shape.width % kPack == 0 && is_aligned(in<S>(rows), 16);
    const auto kernel = packs ? combine_kernel<kPack, S> : combine_kernel<1, S>;
    DL_LAUNCH(
        kernel, static_cast<unsigned>(shape.tokens), threads_for(shape.width, packs ? kPack : 1), 0, stream, in<S>(rows),
        in<int32_t>(row_of_slot), weights.has_value() ? in<float>(*weights) : nullptr, out<S>(result), shape.top_k, shape.width);
  });
  return result;
}

std::tuple<Tensor, Tensor> moe_unpermute_backward_cuda(
    const Tensor& dout, const std::optional<Tensor>& rows, const Tensor& source, const std::optional<Tensor>& weights, int64_t top_k) {
  const PermuteShape shape = moe::check_unpermute(dout, "dout", false, source, weights, top_k);
  moe::check_backward_rows(rows, weights, dout, shape);
  const DeviceGuard guard(dout.get_device_index());
  const cudaStream_t stream = current_stream(dout.get_device_index());
  Tensor drows = torch::stable::new_empty(dout, {shape.slots(), shape.width});
  Tensor dweights = weights.has_value() ? torch::stable::new_empty(*weights, {shape.tokens, shape.top_k})
                                        : torch::stable::new_empty(dout, {0}, ScalarType::Float);
  if (shape.slots() == 0) return {drows, dweights};
  if (weights.has_value()) {  // a slot without a row has no block to write its gradient
    STD_CUDA_CHECK(cudaMemsetAsync(out<float>(dweights), 0, static_cast<size_t>(shape.slots()) * sizeof(float), stream));
  }
  with_type(dout, "moe_unpermute", [&](auto s) {
    using S = decltype(s);
    constexpr int kPack = 16 / sizeof(S);
    const S* row_values = rows.has_value() ? in<S>(*rows) : nullptr;
    const bool packs = shape.width % kPack == 0 && is_aligned(in<S>(dout), 16) && is_aligned(row_values, 16);
    const auto kernel = packs ? spread_kernel<kPack, S> : spread_kernel<1, S>;
    DL_LAUNCH(
        kernel, static_cast<unsigned>(shape.slots()), threads_for(shape.width, packs ? kPack : 1), 0, stream, in<S>(dout), row_values,
        in<int32_t>(source), weights.has_value() ? in<float>(*weights) : nullptr, out<S>(drows),
        weights.has_value() ? out<float>(dweights) : nullptr, shape.slots(), shape.top_k, shape.width);
  });
  return {drows, dweights};
}

void moe_zero_rest_cuda(Tensor& rows, const Tensor& counts) {
  const moe::RestShape shape = moe::check_zero_rest(rows, counts);
  if (shape.rows == 0) return;
  const DeviceGuard guard(rows.get_device_index());
  const cudaStream_t stream = current_stream(rows.get_device_index());
  with_type(rows, "moe_zero_rest_", [&](auto s) {
    using S = decltype(s);
    const auto kernel = zero_rest_kernel<S>;
    DL_LAUNCH(
        kernel, std::min(kRestBlocks, static_cast<unsigned>(shape.rows)), threads_for(shape.width, 4), 0, stream, out<S>(rows),
        in<int32_t>(counts), static_cast<int>(counts.numel()), shape.rows, shape.width);
  });
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, DL_DEVICE_KEY, m) {
  m.impl("moe_permute", TORCH_BOX(&dist_llm::moe_permute_cuda));
  m.impl("moe_unpermute", TORCH_BOX(&dist_llm::moe_unpermute_cuda));
  m.impl("moe_unpermute_backward", TORCH_BOX(&dist_llm::moe_unpermute_backward_cuda));
  m.impl("moe_zero_rest_", TORCH_BOX(&dist_llm::moe_zero_rest_cuda));
}
