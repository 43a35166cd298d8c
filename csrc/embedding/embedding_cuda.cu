// Rows of a table by number on CUDA, forward and backward; the contract is in embedding.h.
//
// NOT YET RUN ON A GPU: this file compiles for sm_80 and sm_90a (tools/compile_cuda.py) and is right in the emulator of
// tests/cuda_emulator; no number in the docs comes from it.
//
// Formula   rows[t] = weight[ids[t]];   dweight[r] = sum over ids[t] = r of drows[t].
// Forward   a block of 4 warps takes 4 tokens, a warp a token, in packs of 16 bytes of the wider of the two types, or single elements
//           where D or a pointer does not allow packs.
// Backward  sorts the tokens by row with a radix sort, 8 bits at a time: (1) each block counts the digits of its kSortTokens tokens;
//           (2) one block turns the counts into positions, digit by digit and in a digit block by block; (3) each block writes its
//           tokens to their positions. A token's place among the equal digits of its block is counted, not drawn by an atomic, so
//           the order is the same each time. Then one block for each sorted token: the first of a row walks that row's
//           tokens in order and adds them, the others leave.
// Cost      2 (V <= 65536) or 3 rounds of three small launches; a row with n tokens takes the time of n reads one after the other
//           (four at once), whatever the others do: about a millisecond where a thousand tokens share a row.
// Bound     by memory: reads the gradients of the tokens once, writes the rows used and, for a whole gradient, the zeros.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cassert>
#include <vector>

#include "common/cuda_launch.h"
#include "common/cuda_tensors.h"
#include "embedding/embedding.h"

namespace dist_llm {
namespace {

using embedding::Shape;

constexpr int kWarps = 4;         // tokens of a block of gather_kernel
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kSortTokens = 256;  // tokens, and threads, of a block of the sort; not fewer than digits
constexpr int kScanThreads = 1024;

// An id that the table does not have stops the device, as in torch: the host cannot know without waiting.
__device__ int64_t checked(int64_t id, int64_t num_rows) {
  assert(id >= 0 && id < num_rows);
  static_cast<void>(num_rows);
  return id;
}

template <int N, class W, class S>
__global__ void gather_kernel(
    const int64_t* __restrict__ ids, const W* __restrict__ weight, S* __restrict__ rows, int64_t tokens, int64_t num_rows, int64_t dim) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= tokens) return;
  const W* from = weight + checked(ids[token], num_rows) * dim;
  S* to = rows + token * dim;
  for (int64_t i = static_cast<int64_t>(threadIdx.x % 32) * N; i < dim; i += 32 * N) {
    float value[N];
    load_floats<N>(from + i, value);
    store_floats<N>(to + i, value);
  }
}

// The first round reads the ids themselves: `sorted` is null, and token t is at t.
__device__ int32_t token_at(const int32_t* sorted, int64_t i) { return sorted == nullptr ? static_cast<int32_t>(i) : sorted[i]; }

__device__ int digit_of(int64_t id, int shift) { return static_cast<int>((id >> shift) & (kDigits - 1)); }

// counts[digit * blocks + block] = tokens of this block with that digit.
__global__ void count_kernel(
    const int64_t* __restrict__ ids, const int32_t* __restrict__ sorted, int32_t* __restrict__ counts, int64_t tokens, int64_t num_rows,
    int shift) {
  __shared__ int digits[kSortTokens];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSortTokens + threadIdx.x;
  digits[threadIdx.x] = i < tokens ? digit_of(checked(ids[token_at(sorted, i)], num_rows), shift) : kDigits;
  __syncthreads();
  const int digit = static_cast<int>(threadIdx.x);
  int count = 0;
  for (int j = 0; j < kSortTokens; ++j) count += digits[j] == digit ? 1 : 0;
  counts[static_cast<int64_t>(digit) * gridDim.x + blockIdx.x] = count;
}

// counts becomes its running sum, each number without itself. One block; a thread takes `count / kScanThreads` neighbours.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(int32_t* __restrict__ counts, int64_t count) {
  __shared__ int32_t sums[kScanThreads];
  const int64_t each = (count + kScanThreads - 1) / kScanThreads;
  const int64_t first = threadIdx.x * each, last = first + each < count ? first + each : count;
  int32_t sum = 0;
  for (int64_t i = first; i < last; ++i) sum += counts[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int offset = 1; offset < kScanThreads; offset *= 2) {
    const int32_t before = static_cast<int>(threadIdx.x) >= offset ? sums[threadIdx.x - offset] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
    __syncthreads();
  }
  int32_t position = sums[threadIdx.x] - sum;
  for (int64_t i = first; i < last; ++i) {
    const int32_t here = counts[i];
    counts[i] = position;
    position += here;
  }
}

// Writes the tokens in the order of this digit; those with the same keep their order.
__global__ void place_kernel(
    const int64_t* __restrict__ ids, const int32_t* __restrict__ sorted, const int32_t* __restrict__ positions,
    int32_t* __restrict__ result, int64_t tokens, int shift) {
  __shared__ int digits[kSortTokens];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSortTokens + threadIdx.x;
  int32_t token = 0;
  int digit = kDigits;
  if (i < tokens) {
    token = token_at(sorted, i);
    digit = digit_of(ids[token], shift);
  }
  digits[threadIdx.x] = digit;
  __syncthreads();
  if (i >= tokens) return;
  int before = 0;
  for (int j = 0; j < static_cast<int>(threadIdx.x); ++j) before += digits[j] == digit ? 1 : 0;
  result[positions[static_cast<int64_t>(digit) * gridDim.x + blockIdx.x] + before] = token;
}

template <int N, class S, class W>
__global__ void add_kernel(
    const S* __restrict__ drows, const int64_t* __restrict__ ids, const int32_t* __restrict__ sorted, W* __restrict__ dweight,
    int64_t tokens, int64_t dim, bool adds) {
  const int64_t first = blockIdx.x;
  const int64_t row = ids[sorted[first]];
  if (first > 0 && ids[sorted[first - 1]] == row) return;
  // The end of the row's tokens: in steps that double, most rows having few, and then by halves.
  int64_t last = first + 1, step = 1;
  while (last + step <= tokens && ids[sorted[last + step - 1]] == row) {
    last += step;
    step *= 2;
  }
  for (; step > 0; step /= 2) {
    if (last + step <= tokens && ids[sorted[last + step - 1]] == row) last += step;
  }
  W* out = dweight + row * dim;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < dim; i += static_cast<int64_t>(blockDim.x) * N) {
    float sum[N] = {};
    if (adds) load_floats<N>(out + i, sum);
    int64_t t = first;
    for (; t + 4 <= last; t += 4) {
      float value[4][N];
#pragma unroll
      for (int u = 0; u < 4; ++u) load_floats<N>(drows + static_cast<int64_t>(sorted[t + u]) * dim + i, value[u]);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += value[u][j];
      }
    }
    for (; t < last; ++t) {
      float value[N];
      load_floats<N>(drows + static_cast<int64_t>(sorted[t]) * dim + i, value);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += value[j];
    }
    store_floats<N>(out + i, sum);
  }
}

// Elements of a pack of two types: 16 bytes of the wider one.
template <class A, class B>
constexpr int kPackOf = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

template <int N, class A, class B>
bool can_pack(const A* a, const B* b, int64_t dim) {
  return dim % N == 0 && is_aligned(a, sizeof(A) * N) && is_aligned(b, sizeof(B) * N);
}

Tensor embedding_cuda(const Tensor& ids, const Tensor& weight, ScalarType dtype) {
  const Shape shape = embedding::check_forward(ids, weight);
  const DeviceGuard guard(weight.get_device_index());
  const cudaStream_t stream = current_stream(weight.get_device_index());
  std::vector<int64_t> size(ids.sizes().begin(), ids.sizes().end());
  size.push_back(shape.dim);
  Tensor rows = torch::stable::new_empty(weight, {size.data(), size.size()}, dtype);
  with_type(weight, "embedding", [&](auto w) {
    with_type(rows, "embedding", [&](auto s) {
      using W = decltype(w);
      using S = decltype(s);
      if (shape.tokens == 0) return;
      constexpr int kPack = kPackOf<W, S>;
      const bool packs = can_pack<kPack>(in<W>(weight), in<S>(rows), shape.dim);
      const auto kernel = packs ? gather_kernel<kPack, W, S> : gather_kernel<1, W, S>;
      const unsigned blocks = static_cast<unsigned>((shape.tokens + kWarps - 1) / kWarps);
      DL_LAUNCH(
          kernel, blocks, 32 * kWarps, 0, stream, in<int64_t>(ids), in<W>(weight), out<S>(rows), shape.tokens, shape.num_rows, shape.dim);
    });
  });
  return rows;
}

// The tokens sorted by row, those of a row in rising order. At least one token.
Tensor sort_tokens(const Tensor& ids, const Shape& shape, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((shape.tokens + kSortTokens - 1) / kSortTokens);
  const int64_t num_counts = static_cast<int64_t>(blocks) * kDigits;
  Tensor counts = torch::stable::new_empty(ids, {num_counts}, ScalarType::Int);
  Tensor result = torch::stable::new_empty(ids, {shape.tokens}, ScalarType::Int);
  Tensor other = torch::stable::new_empty(ids, {shape.tokens}, ScalarType::Int);
  const int32_t* sorted = nullptr;
  // At least one round, also for a table of one row: it writes the order.
  int shift = 0;
  do {
    DL_LAUNCH(
        count_kernel, blocks, kSortTokens, 0, stream, in<int64_t>(ids), sorted, out<int32_t>(counts), shape.tokens, shape.num_rows, shift);
    DL_LAUNCH(scan_kernel, 1, kScanThreads, 0, stream, out<int32_t>(counts), num_counts);
    DL_LAUNCH(
        place_kernel, blocks, kSortTokens, 0, stream, in<int64_t>(ids), sorted, in<int32_t>(counts), out<int32_t>(other), shape.tokens,
        shift);
    std::swap(result, other);
    sorted = in<int32_t>(result);
    shift += kDigitBits;
  } while ((shape.num_rows - 1) >> shift != 0);
  return result;
}

void run_add(const Tensor& drows, const Tensor& ids, Tensor& dweight, const Shape& shape, bool adds, cudaStream_t stream) {
  with_type(drows, "embedding_backward", [&](auto s) {
    with_type(dweight, "embedding_backward", [&](auto w) {
      using S = decltype(s);
      using W = decltype(w);
      if (shape.tokens == 0) return;
      const Tensor sorted = sort_tokens(ids, shape, stream);
      constexpr int kPack = kPackOf<S, W>;
      const bool packs = can_pack<kPack>(in<S>(drows), in<W>(dweight), shape.dim);
      const auto kernel = packs ? add_kernel<kPack, S, W> : add_kernel<1, S, W>;
      const int64_t columns = packs ? (shape.dim + kPack - 1) / kPack : shape.dim;
      const unsigned threads = static_cast<unsigned>(std::min<int64_t>(256, (columns + 31) / 32 * 32));
      DL_LAUNCH(
          kernel, static_cast<unsigned>(shape.tokens), threads, 0, stream, in<S>(drows), in<int64_t>(ids), in<int32_t>(sorted),
          out<W>(dweight), shape.tokens, shape.dim, adds);
    });
  });
}

Tensor embedding_backward_cuda(const Tensor& drows, const Tensor& ids, int64_t num_rows, ScalarType dtype) {
  const Shape shape = embedding::check_backward(drows, ids, num_rows);
  const DeviceGuard guard(drows.get_device_index());
  Tensor dweight = torch::stable::new_zeros(drows, {num_rows, shape.dim}, dtype);
  run_add(drows, ids, dweight, shape, false, current_stream(drows.get_device_index()));
  return dweight;
}

void embedding_backward_into_cuda(const Tensor& drows, const Tensor& ids, Tensor dweight) {
  const Shape shape = embedding::check_backward_into(drows, ids, dweight);
  const DeviceGuard guard(drows.get_device_index());
  run_add(drows, ids, dweight, shape, true, current_stream(drows.get_device_index()));
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, DL_DEVICE_KEY, m) {
  m.impl("embedding", TORCH_BOX(&dist_llm::embedding_cuda));
  m.impl("embedding_backward", TORCH_BOX(&dist_llm::embedding_backward_cuda));
  m.impl("embedding_backward_into", TORCH_BOX(&dist_llm::embedding_backward_into_cuda));
}
