// LayerNorm on CUDA, forward and backward; the contract is in layer_norm.h.
//
// NOT YET RUN ON A GPU: this file compiles for sm_80 and sm_90a (tools/compile_cuda.py) and is right in the emulator of
// tests/cuda_emulator; no number in the docs comes from it.
//
// Formula   y = n w + b,  n = (x - m) r,  r = (mean((x - m)^2) + eps)^-1/2;  with g = dy w: dx = r (g - mean(g) - n mean(g n)) (+ dsummed),
//           dw = sum_rows dy n,  db = sum_rows dy.
// Forward   one block a row, 32 to 1024 threads; a thread handles packs of 16 bytes, or single elements where D or a pointer
//           does not allow packs. The row is read three times (mean, deviation, result), after the first time from cache.
// Backward  at most kMaxParts blocks; block b takes rows b, b + parts, ... and keeps its sums of dw and db in shared memory (in global
//           memory when D is too large for that); each thread owns its columns, so the sums need no atomics. A second kernel
//           adds the parts of a column in a fixed order: the same bits each time.
// Bound     by memory: forward reads x (and residual), writes y (and summed); backward reads dy and x, writes dx.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/cuda_launch.h"
#include "common/cuda_tensors.h"
#include "layer_norm/layer_norm.h"

namespace dist_llm {
namespace {

using layer_norm::Shape;

constexpr int kMaxThreads = 1024;
constexpr int64_t kMaxParts = 512;
constexpr int kMaxSharedBytes = 96 * 1024;  // opt-in shared memory that sm_80 and all later chips of this line have
constexpr int kColumns = 32;                // columns and strips of parts of one block of add_partials_kernel
constexpr int kStrips = 32;

template <int N, class S, class W>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(
    const S* __restrict__ x, const S* __restrict__ residual, const W* __restrict__ weight, const W* __restrict__ bias, S* __restrict__ y,
    S* __restrict__ summed, float* __restrict__ mean, float* __restrict__ rstd, int64_t dim, float eps) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  const int64_t start = row * dim;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * N, stride = static_cast<int64_t>(blockDim.x) * N;
  float sum = 0.f;
  for (int64_t i = first; i < dim; i += stride) {
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
    for (int j = 0; j < N; ++j) sum += value[j];
  }
  const float m = block_sum(sum, scratch) / static_cast<float>(dim);
  // A thread reads back only what it wrote itself, so summed needs no fence.
  const S* normed = residual != nullptr ? summed : x;
  float squares = 0.f;
  for (int64_t i = first; i < dim; i += stride) {
    float value[N];
    load_floats<N>(normed + start + i, value);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      value[j] -= m;
      squares += value[j] * value[j];
    }
  }
  const float r = rsqrtf(block_sum(squares, scratch) / static_cast<float>(dim) + eps);
  if (threadIdx.x == 0) {
    mean[row] = m;
    rstd[row] = r;
  }
  for (int64_t i = first; i < dim; i += stride) {
    float value[N], scale[N], shift[N] = {};
    load_floats<N>(normed + start + i, value);
    load_floats<N>(weight + i, scale);
    if (bias != nullptr) load_floats<N>(bias + i, shift);
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = (value[j] - m) * r * scale[j] + shift[j];
    store_floats<N>(y + start + i, value);
  }
}

template <int N, class S, class W>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(
    const S* __restrict__ dy, const S* __restrict__ x, const W* __restrict__ weight, const float* __restrict__ mean,
    const float* __restrict__ rstd, const S* __restrict__ dsummed, S* __restrict__ dx, float* __restrict__ partials, int64_t rows,
    int64_t dim, int64_t padded_dim, bool sum_in_shared) {
  DL_DYNAMIC_SHARED(float, shared_sums);
  __shared__ float scratch[32];
  float* partial = partials + static_cast<int64_t>(blockIdx.x) * 2 * padded_dim;
  float* sum_w = sum_in_shared ? shared_sums : partial;
  float* sum_b = sum_w + padded_dim;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * N, stride = static_cast<int64_t>(blockDim.x) * N;
  const float zero[N] = {};
  for (int64_t i = first; i < dim; i += stride) {
    store_floats<N>(sum_w + i, zero);
    store_floats<N>(sum_b + i, zero);
  }

  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t start = row * dim;
    const float m = mean[row], r = rstd[row];
    float along_ones = 0.f, along_x = 0.f;
    for (int64_t i = first; i < dim; i += stride) {
      float g[N], v[N], w[N];
      load_floats<N>(dy + start + i, g);
      load_floats<N>(x + start + i, v);
      load_floats<N>(weight + i, w);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        along_ones += g[j] * w[j];
        along_x += g[j] * w[j] * (v[j] - m);
      }
    }
    const float c = block_sum(along_ones, scratch) * r / static_cast<float>(dim);
    const float k = block_sum(along_x, scratch) * r * r * r / static_cast<float>(dim);
    for (int64_t i = first; i < dim; i += stride) {
      float g[N], v[N], w[N], sw[N], sb[N];
      load_floats<N>(dy + start + i, g);
      load_floats<N>(x + start + i, v);
      load_floats<N>(weight + i, w);
      load_floats<N>(sum_w + i, sw);
      load_floats<N>(sum_b + i, sb);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        v[j] -= m;
        sb[j] += g[j];
        g[j] *= r;
        sw[j] += g[j] * v[j];
        g[j] = g[j] * w[j] - c - k * v[j];
      }
      if (dsummed != nullptr) {
        load_floats<N>(dsummed + start + i, v);
#pragma unroll
        for (int j = 0; j < N; ++j) g[j] += v[j];
      }
      store_floats<N>(sum_w + i, sw);
      store_floats<N>(sum_b + i, sb);
      store_floats<N>(dx + start + i, g);
    }
  }
  if (!sum_in_shared) return;
  for (int64_t i = first; i < dim; i += stride) {
    float s[N];
    load_floats<N>(sum_w + i, s);
    store_floats<N>(partial + i, s);
    load_floats<N>(sum_b + i, s);
    store_floats<N>(partial + padded_dim + i, s);
  }
}

// blockIdx.y 0: dweight; 1: dbias.
template <class W>
__global__ void __launch_bounds__(kColumns * kStrips) add_partials_kernel(
    const float* __restrict__ partials, W* __restrict__ dweight, W* __restrict__ dbias, int64_t parts, int64_t dim, int64_t padded_dim) {
  __shared__ float strips[kStrips][kColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  const float* sums = partials + blockIdx.y * padded_dim;
  float sum = 0.f;
  if (column < dim) {
    for (int64_t part = threadIdx.y; part < parts; part += kStrips) sum += sums[2 * part * padded_dim + column];
  }
  strips[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= dim) return;
  float total = 0.f;
  for (int strip = 0; strip < kStrips; ++strip) total += strips[strip][threadIdx.x];
  from_float(total, (blockIdx.y == 0 ? dweight : dbias) + column);
}

// Threads for a row of `dim` elements in packs of `pack`: whole warps, at most kMaxThreads.
unsigned threads_for(int64_t dim, int pack) {
  const int64_t packs = (dim + pack - 1) / pack;
  return static_cast<unsigned>(std::min<int64_t>(kMaxThreads, (packs + 31) / 32 * 32));
}

struct ForwardResult {
  Tensor y;
  Tensor mean;
  Tensor rstd;
};

// summed is written where residual is not null.
ForwardResult run_forward(
    const Tensor& x, const Tensor* residual, const Tensor& weight, const std::optional<Tensor>& bias, double eps, Tensor* summed) {
  const Shape shape = layer_norm::check_input(x, weight);
  layer_norm::check_bias(bias, weight);
  if (residual != nullptr) layer_norm::check_like_x(*residual, x, "residual");
  STD_TORCH_CHECK(shape.rows < (int64_t{1} << 31), "x ", shape_of(x), " has too many rows for one launch; divide it");
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x.get_device_index());
  ForwardResult result{torch::stable::empty_like(x), layer_norm::new_row_numbers(x), layer_norm::new_row_numbers(x)};
  with_types(x, weight, "layer_norm", [&](auto s, auto w) {
    using S = decltype(s);
    using W = decltype(w);
    if (shape.rows == 0) return;
    constexpr int kPack = 16 / sizeof(S);
    const S* other = residual == nullptr ? nullptr : in<S>(*residual);
    const W* shift = bias.has_value() ? in<W>(*bias) : nullptr;
    S* sum = summed == nullptr ? nullptr : out<S>(*summed);
    const bool packs = shape.dim % kPack == 0 && is_aligned(in<S>(x), 16) && is_aligned(other, 16) &&
                       is_aligned(in<W>(weight), sizeof(W) * kPack) && is_aligned(shift, sizeof(W) * kPack);
    const auto kernel = packs ? forward_kernel<kPack, S, W> : forward_kernel<1, S, W>;
    DL_LAUNCH(
        kernel, static_cast<unsigned>(shape.rows), threads_for(shape.dim, packs ? kPack : 1), 0, stream, in<S>(x), other, in<W>(weight),
        shift, out<S>(result.y), sum, out<float>(result.mean), out<float>(result.rstd), shape.dim, static_cast<float>(eps));
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  ForwardResult result = run_forward(x, nullptr, weight, bias, eps, nullptr);
  return {result.y, result.mean, result.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_residual_cuda(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  Tensor summed = torch::stable::empty_like(x);
  ForwardResult result = run_forward(x, &residual, weight, bias, eps, &summed);
  return {result.y, summed, result.mean, result.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cuda(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& dsummed,
    bool with_bias) {
  const Shape shape = layer_norm::check_input(x, weight);
  layer_norm::check_like_x(dy, x, "dy");
  layer_norm::check_row_numbers(mean, x, shape.rows, "mean");
  layer_norm::check_row_numbers(rstd, x, shape.rows, "rstd");
  if (dsummed.has_value()) layer_norm::check_like_x(*dsummed, x, "dsummed");
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x.get_device_index());
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::empty_like(weight);
  Tensor dbias = torch::stable::new_empty(weight, {with_bias ? shape.dim : 0});
  const int64_t parts = std::min(shape.rows, kMaxParts);
  const int64_t padded_dim = (shape.dim + 7) / 8 * 8;  // packs of 8 numbers stay aligned in the second of two sums
  Tensor partials = torch::stable::new_empty(x, {parts, 2 * padded_dim}, ScalarType::Float);

  with_types(x, weight, "layer_norm", [&](auto s, auto w) {
    using S = decltype(s);
    using W = decltype(w);
    constexpr int kPack = 16 / sizeof(S);
    const S* added = dsummed.has_value() ? in<S>(*dsummed) : nullptr;
    if (parts > 0) {
      const bool packs = shape.dim % kPack == 0 && is_aligned(in<S>(dy), 16) && is_aligned(in<S>(x), 16) && is_aligned(added, 16) &&
                         is_aligned(in<W>(weight), sizeof(W) * kPack);
      const auto kernel = packs ? backward_kernel<kPack, S, W> : backward_kernel<1, S, W>;
      const int64_t sum_bytes = 2 * padded_dim * static_cast<int64_t>(sizeof(float));
      const bool sum_in_shared = sum_bytes <= kMaxSharedBytes;
      const int shared_bytes = sum_in_shared ? static_cast<int>(sum_bytes) : 0;
      allow_dynamic_shared(kernel, kMaxSharedBytes);
      DL_LAUNCH(
          kernel, static_cast<unsigned>(parts), threads_for(shape.dim, packs ? kPack : 1), shared_bytes, stream, in<S>(dy), in<S>(x),
          in<W>(weight), in<float>(mean), in<float>(rstd), added, out<S>(dx), out<float>(partials), shape.rows, shape.dim, padded_dim,
          sum_in_shared);
    }
    const dim3 blocks(static_cast<unsigned>((shape.dim + kColumns - 1) / kColumns), with_bias ? 2 : 1);
    DL_LAUNCH(
        add_partials_kernel<W>, blocks, dim3(kColumns, kStrips), 0, stream, in<float>(partials), out<W>(dweight),
        with_bias ? out<W>(dbias) : nullptr, parts, shape.dim, padded_dim);
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, DL_DEVICE_KEY, m) {
  m.impl("layer_norm", TORCH_BOX(&dist_llm::layer_norm_cuda));
  m.impl("layer_norm_residual", TORCH_BOX(&dist_llm::layer_norm_residual_cuda));
  m.impl("layer_norm_backward", TORCH_BOX(&dist_llm::layer_norm_backward_cuda));
}
