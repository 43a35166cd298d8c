// Gelu and swiglu on CUDA, forward and backward; the contract is in activation.h.
//
// NOT YET RUN ON A GPU: this file compiles for sm_80 and sm_90a (tools/compile_cuda.py) and passes its cases in tests/cuda_emulator; no
// number in the docs comes from it.
//
// Formula   y = D(gelu(x + bias)) or D(silu(gate + bias) (up + up_bias)), D the dropout of dropout/keep_cuda.cuh or nothing; backward is
//           their derivative, computed again from the inputs, and its sum over rows for each bias.
// Launch    a block has up to 128 threads, each of which owns N columns (16 bytes; 1 where F or a pointer does not allow packs), and goes
//           through a part of the rows. A thread adds up its columns' gradients in registers; a second kernel adds the parts of a column
//           in a fixed order: the same bits each time. Without biases and dropout a matrix is one long row.
// Bound     by memory. Results in 16 bits are computed with fast exponentials and divisions, unless a bias's gradient is fp32.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "activation/activation.h"
#include "common/cuda_tensors.h"
#include "dropout/keep_cuda.cuh"

namespace dist_llm {
namespace {

using activation::Shape;
using dropout::Mask;
using OptionalTensor = std::optional<Tensor>;

constexpr int kThreads = 128;
constexpr int64_t kMaxParts = 256;  // of rows: times the blocks along a row, enough for every multiprocessor
constexpr int kColumns = 32;        // columns and strips of parts of one block of add_parts_kernel
constexpr int kStrips = 32;

// is_fast: for results in 16 bits.
template <bool is_fast>
struct Formulas {
  static __device__ float power(float v) {
    if constexpr (is_fast) return __expf(v);
    return expf(v);
  }
  static __device__ float reciprocal(float v) {
    if constexpr (is_fast) return __fdividef(1.f, v);
    return 1.f / v;
  }
  static __device__ float sigmoid(float v) { return reciprocal(1.f + power(-v)); }
  // A NaN passes.
  static __device__ float bounded(float v, float limit) { return v > limit ? limit : v < -limit ? -limit : v; }

  static __device__ float gelu_argument(float v) {
    return v * (static_cast<float>(activation::kGelu) + static_cast<float>(activation::kGeluCube) * v * v);
  }
  static __device__ float gelu(float v) { return v * sigmoid(gelu_argument(v)); }
  // s + v s (1 - s) (c + 3 c3 v^2), where 1 - s is e s with e = 1 / s - 1, which loses no digit where s is near 1.
  static __device__ float gelu_slope(float any) {
    const float v = bounded(any, activation::kGeluFlat);
    const float e = power(-gelu_argument(v)), s = reciprocal(1.f + e);
    const float inner = v * (static_cast<float>(activation::kGelu) + static_cast<float>(3. * activation::kGeluCube) * v * v);
    return s * (1.f + inner * (e * s));
  }
  static __device__ float silu(float v) { return v * sigmoid(v); }
  static __device__ void silu_and_slope(float any, float& value, float& slope) {
    const float v = bounded(any, activation::kSiluFlat);
    const float e = power(-v), s = reciprocal(1.f + e);
    value = (any < -activation::kSiluFlat ? v : any) * s;
    slope = s * (1.f + v * (e * s));
  }
};

template <class S, class W>
struct Args {
  const S* dy;  // null: forward
  const S* x;
  const S* up;  // null: gelu
  const W* bias;
  const W* up_bias;
  S* y;
  S* dx;
  S* dup;
  float* sums;  // (parts, 2, dim); null: no biases
  Mask mask;
  bool drops;
  int64_t rows, dim, rows_per_part;
};

// N elements of x plus their biases.
template <int N, class S, class W>
__device__ inline void load_biased(const S* x, const W* bias, int64_t i, float (&value)[N]) {
  load_floats<N>(x, value);
  if (bias == nullptr) return;
  float b[N];
  load_floats<N>(bias + i, b);
#pragma unroll
  for (int j = 0; j < N; ++j) value[j] += b[j];
}

template <int N, bool is_fast, class S, class W>
__device__ inline void forward_elements(const Args<S, W>& args, int64_t row, int64_t i) {
  using F = Formulas<is_fast>;
  const int64_t at = row * args.dim + i;
  float value[N];
  load_biased<N>(args.x + at, args.bias, i, value);
  if (args.up == nullptr) {
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = F::gelu(value[j]);
  } else {
    float up[N];
    load_biased<N>(args.up + at, args.up_bias, i, up);
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = F::silu(value[j]) * up[j];
  }
  if (args.drops) {
    const uint32_t keep = keep_elements<N>(args.mask, row, i);
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = (keep >> j & 1u) != 0 ? value[j] * args.mask.scale : 0.f;
  }
  store_floats<N>(args.y + at, value);
}

// Adds to sum and up_sum what it writes to dx and dup.
template <int N, bool is_fast, class S, class W>
__device__ inline void backward_elements(const Args<S, W>& args, int64_t row, int64_t i, float (&sum)[N], float (&up_sum)[N]) {
  using F = Formulas<is_fast>;
  const int64_t at = row * args.dim + i;
  float grad[N], value[N];
  load_floats<N>(args.dy + at, grad);
  if (args.drops) {
    const uint32_t keep = keep_elements<N>(args.mask, row, i);
#pragma unroll
    for (int j = 0; j < N; ++j) grad[j] = (keep >> j & 1u) != 0 ? grad[j] * args.mask.scale : 0.f;
  }
  load_biased<N>(args.x + at, args.bias, i, value);
  if (args.up == nullptr) {
#pragma unroll
    for (int j = 0; j < N; ++j) grad[j] *= F::gelu_slope(value[j]);
  } else {
    float up[N], dup[N];
    load_biased<N>(args.up + at, args.up_bias, i, up);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float silu, slope;
      F::silu_and_slope(value[j], silu, slope);
      dup[j] = grad[j] * silu;
      up_sum[j] += dup[j];
      grad[j] = grad[j] * up[j] * slope;
    }
    store_floats<N>(args.dup + at, dup);
  }
#pragma unroll
  for (int j = 0; j < N; ++j) sum[j] += grad[j];
  store_floats<N>(args.dx + at, grad);
}

// N columns of a part of the rows.
template <int N, bool is_fast, class S, class W>
__device__ inline void activate_columns(const Args<S, W>& args, int64_t i) {
  const int64_t begin = blockIdx.y * args.rows_per_part;
  const int64_t end = begin + args.rows_per_part < args.rows ? begin + args.rows_per_part : args.rows;
  if (args.dy == nullptr) {
    for (int64_t row = begin; row < end; ++row) forward_elements<N, is_fast>(args, row, i);
    return;
  }
  float sum[N] = {}, up_sum[N] = {};
  for (int64_t row = begin; row < end; ++row) backward_elements<N, is_fast>(args, row, i, sum, up_sum);
  if (args.sums == nullptr) return;
  float* part = args.sums + blockIdx.y * 2 * args.dim + i;
#pragma unroll
  for (int j = 0; j < N; ++j) part[j] = sum[j];
  if (args.up == nullptr) return;
#pragma unroll
  for (int j = 0; j < N; ++j) part[args.dim + j] = up_sum[j];
}

template <int N, bool is_fast, class S, class W>
__global__ void __launch_bounds__(kThreads) activation_kernel(const Args<S, W> args) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (i + N <= args.dim) {
    activate_columns<N, is_fast>(args, i);
  } else {
    // The end of a matrix that is taken as one row; other rows of packs have none.
    for (int64_t j = i; j < args.dim; ++j) activate_columns<1, is_fast>(args, j);
  }
}

// result[i] = sum over parts of sums[part * stride + i].
template <class W>
__global__ void __launch_bounds__(kColumns * kStrips) add_parts_kernel(
    const float* __restrict__ sums, W* __restrict__ result, int64_t parts, int64_t stride, int64_t dim) {
  __shared__ float strips[kStrips][kColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  float sum = 0.f;
  if (column < dim) {
    for (int64_t part = threadIdx.y; part < parts; part += kStrips) sum += sums[part * stride + column];
  }
  strips[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= dim) return;
  float total = 0.f;
  for (int strip = 0; strip < kStrips; ++strip) total += strips[strip][threadIdx.x];
  from_float(total, result + column);
}

template <class S, class W>
void launch(Args<S, W>& args, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(S);
  constexpr bool is_fast = sizeof(S) == 2 && sizeof(W) == 2;
  const bool packs = (args.rows == 1 || args.dim % kPack == 0) && is_aligned(args.dy, 16) && is_aligned(args.x, 16) &&
                     is_aligned(args.up, 16) && is_aligned(args.y, 16) && is_aligned(args.dx, 16) && is_aligned(args.dup, 16) &&
                     is_aligned(args.bias, sizeof(W) * kPack) && is_aligned(args.up_bias, sizeof(W) * kPack);
  const auto kernel = packs ? activation_kernel<kPack, is_fast, S, W> : activation_kernel<1, is_fast, S, W>;
  const int64_t columns = (args.dim + (packs ? kPack : 1) - 1) / (packs ? kPack : 1);
  const unsigned threads = static_cast<unsigned>(std::min<int64_t>(kThreads, (columns + 31) / 32 * 32));
  const int64_t parts = (args.rows + args.rows_per_part - 1) / args.rows_per_part;
  const dim3 grid(static_cast<unsigned>((columns + threads - 1) / threads), static_cast<unsigned>(parts));
  DL_LAUNCH(kernel, grid, threads, 0, stream, args);
}

// Calls f(S{}, W{}) with the storage types of x and its biases; without biases they are alike.
template <class F>
void with_bias_types(const Tensor& x, const OptionalTensor& bias, const F& f) {
  if (bias.has_value()) return with_types(x, *bias, "activation", f);
  with_type(x, "activation", [&](auto s) { f(s, s); });
}

template <class W>
const W* in_or_null(const OptionalTensor& t) {
  return t.has_value() ? in<W>(*t) : nullptr;
}

Tensor forward(
    const Tensor& x, const Tensor* up, const OptionalTensor& bias, const OptionalTensor& up_bias, const std::optional<Mask>& mask,
    Shape shape) {
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x.get_device_index());
  const bool is_flat = !bias.has_value() && !mask.has_value();
  with_bias_types(x, bias, [&](auto s, auto w) {
    using S = decltype(s);
    using W = decltype(w);
    Args<S, W> args{};
    args.x = in<S>(x);
    args.up = up == nullptr ? nullptr : in<S>(*up);
    args.bias = in_or_null<W>(bias);
    args.up_bias = in_or_null<W>(up_bias);
    args.y = out<S>(y);
    args.drops = mask.has_value();
    if (mask.has_value()) args.mask = *mask;
    args.rows = is_flat ? 1 : shape.rows;
    args.dim = is_flat ? x.numel() : shape.dim;
    args.rows_per_part = (args.rows + kMaxParts - 1) / kMaxParts;
    launch(args, stream);
  });
  return y;
}

// dx, dup (x itself for gelu), and the gradients of the biases.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& x, const Tensor* up, const OptionalTensor& bias, const OptionalTensor& up_bias,
    const std::optional<Mask>& mask, Shape shape) {
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x.get_device_index());
  Tensor dx = torch::stable::empty_like(x);
  Tensor dup = up == nullptr ? dx : torch::stable::empty_like(x);
  Tensor dbias = bias.has_value() ? torch::stable::empty_like(*bias) : torch::stable::new_empty(x, {0});
  Tensor dup_bias = up_bias.has_value() ? torch::stable::empty_like(*up_bias) : torch::stable::new_empty(x, {0});
  const bool is_flat = !bias.has_value() && !mask.has_value();
  const int64_t rows = is_flat ? 1 : shape.rows, dim = is_flat ? x.numel() : shape.dim;
  const int64_t rows_per_part = std::max<int64_t>(1, (rows + kMaxParts - 1) / kMaxParts);
  const int64_t parts = (rows + rows_per_part - 1) / rows_per_part;
  Tensor partials = torch::stable::new_empty(x, {bias.has_value() ? parts : 0, 2, dim}, ScalarType::Float);
  with_bias_types(x, bias, [&](auto s, auto w) {
    using S = decltype(s);
    using W = decltype(w);
    Args<S, W> args{};
    args.dy = in<S>(dy);
    args.x = in<S>(x);
    args.up = up == nullptr ? nullptr : in<S>(*up);
    args.bias = in_or_null<W>(bias);
    args.up_bias = in_or_null<W>(up_bias);
    args.dx = out<S>(dx);
    args.dup = up == nullptr ? nullptr : out<S>(dup);
    args.sums = bias.has_value() ? out<float>(partials) : nullptr;
    args.drops = mask.has_value();
    if (mask.has_value()) args.mask = *mask;
    args.rows = rows;
    args.dim = dim;
    args.rows_per_part = rows_per_part;
    if (x.numel() > 0) launch(args, stream);
    if (!bias.has_value()) return;
    const unsigned blocks = static_cast<unsigned>((dim + kColumns - 1) / kColumns);
    const dim3 threads(kColumns, kStrips);
    const float* sums = in<float>(partials);
    DL_LAUNCH(add_parts_kernel<W>, blocks, threads, 0, stream, sums, out<W>(dbias), parts, 2 * dim, dim);
    if (!up_bias.has_value()) return;
    DL_LAUNCH(add_parts_kernel<W>, blocks, threads, 0, stream, sums + dim, out<W>(dup_bias), parts, 2 * dim, dim);
  });
  return {dx, dup, dbias, dup_bias};
}

Tensor gelu_cuda(
    const Tensor& x, const OptionalTensor& bias, double p, int64_t key0, int64_t key1, const OptionalTensor& samples,
    const OptionalTensor& columns, int64_t feature_start) {
  const Shape shape = activation::check_input(x, "x");
  activation::check_bias(bias, x, shape.dim, "bias", "x");
  return forward(x, nullptr, bias, std::nullopt, activation::make_mask(x, p, key0, key1, samples, columns, feature_start), shape);
}

std::tuple<Tensor, Tensor> gelu_backward_cuda(
    const Tensor& dy, const Tensor& x, const OptionalTensor& bias, double p, int64_t key0, int64_t key1, const OptionalTensor& samples,
    const OptionalTensor& columns, int64_t feature_start) {
  const Shape shape = activation::check_input(x, "x");
  activation::check_like(dy, x, "dy", "x");
  activation::check_bias(bias, x, shape.dim, "bias", "x");
  const auto mask = activation::make_mask(x, p, key0, key1, samples, columns, feature_start);
  auto [dx, dup, dbias, dup_bias] = backward(dy, x, nullptr, bias, std::nullopt, mask, shape);
  return {dx, dbias};
}

Shape check_swiglu(const Tensor& gate, const Tensor& up, const OptionalTensor& gate_bias, const OptionalTensor& up_bias) {
  const Shape shape = activation::check_input(gate, "gate");
  activation::check_like(up, gate, "up", "gate");
  activation::check_bias(gate_bias, gate, shape.dim, "gate_bias", "gate");
  activation::check_bias(up_bias, gate, shape.dim, "up_bias", "gate");
  activation::check_biases(gate_bias, up_bias);
  return shape;
}

Tensor swiglu_cuda(
    const Tensor& gate, const Tensor& up, const OptionalTensor& gate_bias, const OptionalTensor& up_bias, double p, int64_t key0,
    int64_t key1, const OptionalTensor& samples, const OptionalTensor& columns, int64_t feature_start) {
  const Shape shape = check_swiglu(gate, up, gate_bias, up_bias);
  const auto mask = activation::make_mask(gate, p, key0, key1, samples, columns, feature_start);
  return forward(gate, &up, gate_bias, up_bias, mask, shape);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_backward_cuda(
    const Tensor& dy, const Tensor& gate, const Tensor& up, const OptionalTensor& gate_bias, const OptionalTensor& up_bias, double p,
    int64_t key0, int64_t key1, const OptionalTensor& samples, const OptionalTensor& columns, int64_t feature_start) {
  const Shape shape = check_swiglu(gate, up, gate_bias, up_bias);
  activation::check_like(dy, gate, "dy", "gate");
  const auto mask = activation::make_mask(gate, p, key0, key1, samples, columns, feature_start);
  return backward(dy, gate, &up, gate_bias, up_bias, mask, shape);
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, DL_DEVICE_KEY, m) {
  m.impl("gelu", TORCH_BOX(&dist_llm::gelu_cuda));
  m.impl("gelu_backward", TORCH_BOX(&dist_llm::gelu_backward_cuda));
  m.impl("swiglu", TORCH_BOX(&dist_llm::swiglu_cuda));
  m.impl("swiglu_backward", TORCH_BOX(&dist_llm::swiglu_backward_cuda));
}
