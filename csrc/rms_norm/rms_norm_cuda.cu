// RMSNorm on CUDA, forward and backward; the contract is in rms_norm.h.
//
// NOT YET RUN ON A GPU: this file compiles for sm_80 and sm_90a (tools/compile_cuda.py) and is right in the emulator of
// tests/cuda_emulator; no number in the docs comes from it.
//
// Formula   y = x r w,  r = (mean(x^2) + eps)^-1/2;   dx = r w dy - r^3 / D x sum(dy w x) (+ dsummed);   dw = sum_rows dy x r.
// Forward   one block a row, 32 to 1024 threads; a thread handles packs of 16 bytes, or single elements where D or a pointer
//           does not allow packs. The row is read twice, the second time from cache.
// Backward  at most kMaxParts blocks; block b takes rows b, b + parts, ... and keeps its sum of dw in shared memory (in global
//           memory when D is too large for that); each thread owns its columns, so the sum needs no atomics. A second kernel
//           adds the parts of a column in a fixed order: the same bits each time.
// Bound     by memory: forward reads x (and residual), writes y (and summed); backward reads dy and x, writes dx.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/cuda_launch.h"
#include "common/cuda_tensors.h"
#include "rms_norm/rms_norm.h"

namespace dist_llm {
namespace {

using rms_norm::Shape;

constexpr int kMaxThreads = 1024;
constexpr int64_t kMaxParts = 512;
constexpr int kMaxSharedBytes = 96 * 1024;  // opt-in shared memory that sm_80 and all later chips of this line have
constexpr int kColumns = 32;                // columns and strips of parts of one block of add_partials_kernel
constexpr int kStrips = 32;

template <int N, class S, class W>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(
    const S* __restrict__ x, const S* __restrict__ residual, const W* __restrict__ weight, S* __restrict__ y, S* __restrict__ summed,
    float* __restrict__ rstd, int64_t dim, float eps) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  const int64_t start = row * dim;
  float squares = 0.f;
  for (int64_t i = threadIdx.x * N; i < dim; i += static_cast<int64_t>(blockDim.x) * N) {
    float value[N];
    load_floats<N>(x + start + i, value);
    if (residual != nullptr) {
      float other[N];
      load_floats<N>(residual + start + i, other);
#pragma unroll
      for (int j = 0; j < N; ++j) value[j] += other[j];
      store_floats<N>(summed + start + i, value);
      load_floats<N>(summed + start + i, value);  // the norm sees the rounded sum, as backward will
    }
#pragma unroll
    for (int j = 0; j < N; ++j) squares += value[j] * value[j];
  }
  const float r = rsqrtf(block_sum(squares, scratch) / static_cast<float>(dim) + eps);
  if (threadIdx.x == 0) rstd[row] = r;
  // A thread reads back only what it wrote itself, so summed needs no fence.
  const S* normed = residual != nullptr ? summed : x;
  for (int64_t i = threadIdx.x * N; i < dim; i += static_cast<int64_t>(blockDim.x) * N) {
    float value[N], scale[N];
    load_floats<N>(normed + start + i, value);
    load_floats<N>(weight + i, scale);
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = value[j] * r * scale[j];
    store_floats<N>(y + start + i, value);
  }
}

template <int N, class S, class W>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(
    const S* __restrict__ dy, const S* __restrict__ x, const W* __restrict__ weight, const float* __restrict__ rstd,
    const S* __restrict__ dsummed, S* __restrict__ dx, float* __restrict__ partials, int64_t rows, int64_t dim, bool sum_in_shared) {
  DL_DYNAMIC_SHARED(float, shared_sum);
  __shared__ float scratch[32];
  float* partial = partials + blockIdx.x * dim;
  float* sum = sum_in_shared ? shared_sum : partial;
  const int64_t first = threadIdx.x * N, stride = static_cast<int64_t>(blockDim.x) * N;
  const float zero[N] = {};
  for (int64_t i = first; i < dim; i += stride) store_floats<N>(sum + i, zero);

  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t start = row * dim;
    float along_x = 0.f;
    for (int64_t i = first; i < dim; i += stride) {
      float g[N], v[N], w[N];
      load_floats<N>(dy + start + i, g);
      load_floats<N>(x + start + i, v);
      load_floats<N>(weight + i, w);
#pragma unroll
      for (int j = 0; j < N; ++j) along_x += g[j] * w[j] * v[j];
    }
    const float r = rstd[row];
    const float k = block_sum(along_x, scratch) * r * r * r / static_cast<float>(dim);
    for (int64_t i = first; i < dim; i += stride) {
      float g[N], v[N], w[N], s[N];
      load_floats<N>(dy + start + i, g);
      load_floats<N>(x + start + i, v);
      load_floats<N>(weight + i, w);
      load_floats<N>(sum + i, s);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        g[j] *= r;
        s[j] += g[j] * v[j];
        g[j] = g[j] * w[j] - k * v[j];
      }
      if (dsummed != nullptr) {
        load_floats<N>(dsummed + start + i, v);
#pragma unroll
        for (int j = 0; j < N; ++j) g[j] += v[j];
      }
      store_floats<N>(sum + i, s);
      store_floats<N>(dx + start + i, g);
    }
  }
  if (!sum_in_shared) return;
  for (int64_t i = first; i < dim; i += stride) {
    float s[N];
    load_floats<N>(sum + i, s);
    store_floats<N>(partial + i, s);
  }
}

template <class W>
__global__ void __launch_bounds__(kColumns * kStrips) add_partials_kernel(
    const float* __restrict__ partials, W* __restrict__ dweight, int64_t parts, int64_t dim) {
  __shared__ float strips[kStrips][kColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  float sum = 0.f;
  if (column < dim) {
    for (int64_t part = threadIdx.y; part < parts; part += kStrips) sum += partials[part * dim + column];
  }
  strips[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= dim) return;
  float total = 0.f;
  for (int strip = 0; strip < kStrips; ++strip) total += strips[strip][threadIdx.x];
  from_float(total, dweight + column);
}

// Threads for a row of `dim` elements in packs of `pack`: whole warps, at most kMaxThreads.
unsigned threads_for(int64_t dim, int pack) {
  const int64_t packs = (dim + pack - 1) / pack;
  return static_cast<unsigned>(std::min<int64_t>(kMaxThreads, (packs + 31) / 32 * 32));
}

void run_forward(
    const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, Tensor& y, Tensor* summed, Tensor& rstd, Shape shape) {
  if (shape.rows == 0) return;
  STD_TORCH_CHECK(shape.rows < (int64_t{1} << 31), "x ", shape_of(x), " has too many rows for one launch; divide it");
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x.get_device_index());
  with_types(x, weight, "rms_norm", [&](auto s, auto w) {
    using S = decltype(s);
    using W = decltype(w);
    constexpr int kPack = 16 / sizeof(S);
    const S* other = residual == nullptr ? nullptr : in<S>(*residual);
    S* sum = summed == nullptr ? nullptr : out<S>(*summed);
    const bool packs = shape.dim % kPack == 0 && is_aligned(in<S>(x), 16) && is_aligned(other, 16) &&
                       is_aligned(in<W>(weight), sizeof(W) * kPack);
    const auto kernel = packs ? forward_kernel<kPack, S, W> : forward_kernel<1, S, W>;
    DL_LAUNCH(
        kernel, static_cast<unsigned>(shape.rows), threads_for(shape.dim, packs ? kPack : 1), 0, stream, in<S>(x), other, in<W>(weight),
        out<S>(y), sum, out<float>(rstd), shape.dim, static_cast<float>(eps));
  });
}

std::tuple<Tensor, Tensor> rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps) {
  const Shape shape = rms_norm::check_input(x, weight);
  Tensor y = torch::stable::empty_like(x);
  Tensor rstd = rms_norm::new_rstd(x);
  run_forward(x, nullptr, weight, eps, y, nullptr, rstd, shape);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_residual_cuda(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const Shape shape = rms_norm::check_input(x, weight);
  rms_norm::check_like_x(residual, x, "residual");
  Tensor y = torch::stable::empty_like(x);
  Tensor summed = torch::stable::empty_like(x);
  Tensor rstd = rms_norm::new_rstd(x);
  run_forward(x, &residual, weight, eps, y, &summed, rstd, shape);
  return {y, summed, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cuda(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, const std::optional<Tensor>& dsummed) {
  const Shape shape = rms_norm::check_input(x, weight);
  rms_norm::check_like_x(dy, x, "dy");
  rms_norm::check_rstd(rstd, x, shape.rows);
  if (dsummed.has_value()) rms_norm::check_like_x(*dsummed, x, "dsummed");
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x.get_device_index());
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::empty_like(weight);
  const int64_t parts = std::min(shape.rows, kMaxParts);
  Tensor partials = torch::stable::new_empty(x, {parts, shape.dim}, ScalarType::Float);

  with_types(x, weight, "rms_norm", [&](auto s, auto w) {
    using S = decltype(s);
    using W = decltype(w);
    constexpr int kPack = 16 / sizeof(S);
    const S* added = dsummed.has_value() ? in<S>(*dsummed) : nullptr;
    if (parts > 0) {
      const bool packs = shape.dim % kPack == 0 && is_aligned(in<S>(dy), 16) && is_aligned(in<S>(x), 16) && is_aligned(added, 16) &&
                         is_aligned(in<W>(weight), sizeof(W) * kPack);
      const auto kernel = packs ? backward_kernel<kPack, S, W> : backward_kernel<1, S, W>;
      const int64_t sum_bytes = shape.dim * static_cast<int64_t>(sizeof(float));
      const bool sum_in_shared = sum_bytes <= kMaxSharedBytes;
      const int shared_bytes = sum_in_shared ? static_cast<int>(sum_bytes) : 0;
      allow_dynamic_shared(kernel, kMaxSharedBytes);
      DL_LAUNCH(
          kernel, static_cast<unsigned>(parts), threads_for(shape.dim, packs ? kPack : 1), shared_bytes, stream, in<S>(dy), in<S>(x),
          in<W>(weight), in<float>(rstd), added, out<S>(dx), out<float>(partials), shape.rows, shape.dim, sum_in_shared);
    }
    const unsigned blocks = static_cast<unsigned>((shape.dim + kColumns - 1) / kColumns);
    DL_LAUNCH(
        add_partials_kernel<W>, blocks, dim3(kColumns, kStrips), 0, stream, in<float>(partials), out<W>(dweight), parts, shape.dim);
  });
  return {dx, dweight};
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, DL_DEVICE_KEY, m) {
  m.impl("rms_norm", TORCH_BOX(&dist_llm::rms_norm_cuda));
  m.impl("rms_norm_residual", TORCH_BOX(&dist_llm::rms_norm_residual_cuda));
  m.impl("rms_norm_backward", TORCH_BOX(&dist_llm::rms_norm_backward_cuda));
}
