// Cross-entropy on CUDA; the contract is in cross_entropy.h.
//
// NOT YET RUN ON A GPU: this file compiles for sm_80 and sm_90a (tools/compile_cuda.py) and passes its tests emulated
// (tests/cuda_emulator); nothing is known of its speed.
//
// Formula   nll = log(sum exp(x - max)) + max - x[target], + z lse^2;   dx = dloss ((1 + 2 z lse) exp(x - max) / sum - [target]).
// Forward   one block a row, 32 to 1024 threads, 16 bytes at a time between the row's first and last aligned address. Each thread keeps the
//           largest number of its own so far and the sum of exponentials shifted by it; then maxima and sums meet. The gradient over the
//           logits is a second pass over the row, which is in a cache by then. A second kernel adds the losses of the rows in fp64.
// Backward  one block a row, element by element; the target's own number is computed in fp64, where the model is sure it is a small
//           difference of numbers close to dloss.
// Targets   outside [0, V) that are not ignored: finding one out would stop the queue, so its loss and the gradient of its row are NaN.
// Bound     by memory: forward reads the logits, backward reads and writes them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/cuda_tensors.h"
#include "cross_entropy/cross_entropy.h"

namespace dist_llm {
namespace {

using cross_entropy::Shape;

constexpr int kMaxThreads = 1024;
constexpr int kLossThreads = 1024;

template <class S>
struct ForwardArgs {
  const S* logits;
  S* gradient;  // the logits themselves, to be overwritten, or null
  const int64_t* targets;
  float* row_max;  // these four may be null: not wanted
  float* row_sum;
  float* target_logit;
  double* losses;
  int64_t vocab;
  int64_t vocab_start;
  int64_t ignore;
  double z_loss;
  bool is_whole;  // the columns are all there are: every target must be one of them
};

template <class S>
struct BackwardArgs {
  const S* logits;
  const int64_t* targets;
  const float* row_max;
  const float* row_sum;
  const float* dloss;
  S* dlogits;
  int64_t vocab;
  int64_t vocab_start;
  int64_t ignore;
  double z_loss;
  bool packs;  // logits and dlogits have the same place within 16 bytes
};

// 16-bit logits are themselves off by more than the fast exponential is.
__device__ inline float exp_of(float x, float) { return expf(x); }
template <class S>
__device__ inline float exp_of(float x, S) {
  return __expf(x);
}

// What is subtracted before exponentials: with only -inf so far, -inf itself would give a NaN, and anything finite gives 0.
__device__ inline float shift_of(float max) { return max == -INFINITY ? 0.f : max; }

// Calls f(first column, numbers) for all columns of this thread, 16 bytes at a time where addresses allow it.
template <class S, class F>
__device__ inline void visit_row(const S* row, int64_t count, bool packs, const F& f) {
  constexpr int kPack = 16 / sizeof(S);
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(S));
  const int64_t before = packs ? min(count, (kPack - past) % kPack) : count;
  const int64_t end = before + (count - before) / kPack * kPack;
  for (int64_t i = threadIdx.x; i < before; i += blockDim.x) {
    const float single[1] = {to_float(row[i])};
    f(i, single);
  }
  for (int64_t i = before + static_cast<int64_t>(threadIdx.x) * kPack; i < end; i += static_cast<int64_t>(blockDim.x) * kPack) {
    float pack[kPack];
    load_floats<kPack>(row + i, pack);
    f(i, static_cast<const float(&)[kPack]>(pack));
  }
  for (int64_t i = end + threadIdx.x; i < count; i += blockDim.x) {
    const float single[1] = {to_float(row[i])};
    f(i, single);
  }
}

// The largest number of all threads and the sum of their sums, given to all of them, always in the same order. `scratch` holds 32 numbers.
__device__ inline float block_max(float value, double* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  __syncthreads();  // the previous result may still be read
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = lane < num_warps ? static_cast<float>(scratch[lane]) : -INFINITY;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

__device__ inline double block_sum(double value, double* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  __syncthreads();  // the previous result may still be read
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = lane < num_warps ? scratch[lane] : 0.;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The gradient of one row: exp(x - max) factor, minus dloss at the target; out may be x.
template <class S>
__device__ inline void write_gradient(const S* x, S* out, int64_t vocab, bool packs, float max, double factor, int64_t target, double dloss) {
  const float k = static_cast<float>(factor);
  visit_row(x, vocab, packs, [&](int64_t first, const auto& numbers) {
    constexpr int kCount = sizeof(numbers) / sizeof(float);
    float grads[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      grads[j] = exp_of(numbers[j] - max, S{}) * k;
      if (first + j == target) {
        grads[j] = static_cast<float>(exp(static_cast<double>(numbers[j]) - static_cast<double>(max)) * factor - dloss);
      }
    }
    store_floats<kCount>(out + first, grads);
  });
}

template <class S>
__device__ inline void write_zeros(S* out, int64_t vocab, bool packs) {
  visit_row(out, vocab, packs, [&](int64_t first, const auto& numbers) {
    constexpr int kCount = sizeof(numbers) / sizeof(float);
    const float zeros[kCount] = {};
    store_floats<kCount>(out + first, zeros);
  });
}

__device__ inline int64_t column_of(int64_t target, int64_t vocab_start, int64_t vocab) {
  return target >= vocab_start && target - vocab_start < vocab ? target - vocab_start : -1;
}

template <class S>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(const ForwardArgs<S> args) {
  __shared__ double scratch[32];
  __shared__ double row_factor;
  const int64_t row = blockIdx.x, target = args.targets[row];
  const S* x = args.logits + row * args.vocab;
  float max = 0.f, target_logit = 0.f;
  double sum = 1., loss = 0.;
  const bool is_ignored = target == args.ignore;
  int64_t column = -1;
  if (!is_ignored) {
    column = column_of(target, args.vocab_start, args.vocab);
    if (column >= 0) target_logit = to_float(x[column]);
    float own_max = -INFINITY, own_sum = 0.f;
    visit_row(x, args.vocab, true, [&](int64_t, const auto& numbers) {
      constexpr int kCount = sizeof(numbers) / sizeof(float);
      float largest = own_max;
#pragma unroll
      for (int j = 0; j < kCount; ++j) largest = fmaxf(largest, numbers[j]);
      const float shift = shift_of(largest);
      if (largest > own_max) own_sum *= exp_of(own_max - shift, S{});
      own_max = largest;
#pragma unroll
      for (int j = 0; j < kCount; ++j) own_sum += exp_of(numbers[j] - shift, S{});
    });
    max = block_max(own_max, scratch);
    sum = block_sum(static_cast<double>(own_sum) * exp(static_cast<double>(own_max) - static_cast<double>(shift_of(max))), scratch);
  }
  if (threadIdx.x == 0) {
    if (!is_ignored && args.is_whole && column < 0) sum = NAN;
    if (!is_ignored) {
      const double log_sum = log(sum), lse = static_cast<double>(max) + log_sum;
      // The logits are subtracted first: their difference is small where both are large.
      loss = log_sum + (static_cast<double>(max) - static_cast<double>(target_logit)) + args.z_loss * lse * lse;
      row_factor = (1. + 2. * args.z_loss * lse) / sum;
    }
    if (args.row_max != nullptr) args.row_max[row] = max;
    if (args.row_sum != nullptr) args.row_sum[row] = static_cast<float>(sum);
    if (args.target_logit != nullptr) args.target_logit[row] = target_logit;
    if (args.losses != nullptr) args.losses[row] = loss;
  }
  if (args.gradient == nullptr) return;
  S* gradient = args.gradient + row * args.vocab;
  if (is_ignored) {
    write_zeros(gradient, args.vocab, true);
    return;
  }
  __syncthreads();
  write_gradient(x, gradient, args.vocab, true, max, row_factor, column, 1.);
}

// The rows in order, a part of them each thread, the parts in order.
__global__ void __launch_bounds__(kLossThreads) add_losses_kernel(
    const double* __restrict__ losses, float* __restrict__ loss, int64_t rows) {
  __shared__ double scratch[32];
  double sum = 0.;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) sum += losses[row];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum);
}

template <class S>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(const BackwardArgs<S> args) {
  __shared__ double row_factor;
  const int64_t row = blockIdx.x, target = args.targets[row];
  const S* x = args.logits + row * args.vocab;
  S* dx = args.dlogits + row * args.vocab;
  if (target == args.ignore) {
    write_zeros(dx, args.vocab, true);
    return;
  }
  const double dloss = *args.dloss;
  const float max = args.row_max[row];
  if (threadIdx.x == 0) {
    const double sum = args.row_sum[row];
    double size = dloss;
    if (args.z_loss != 0.) size *= 1. + 2. * args.z_loss * (static_cast<double>(max) + log(sum));
    row_factor = size / sum;
  }
  __syncthreads();
  write_gradient(x, dx, args.vocab, args.packs, max, row_factor, column_of(target, args.vocab_start, args.vocab), dloss);
}

// Threads for a row: whole warps, at most kMaxThreads.
unsigned threads_for(int64_t vocab, int64_t element_size) {
  const int64_t packs = (vocab * element_size + 15) / 16;
  return static_cast<unsigned>(std::min<int64_t>(kMaxThreads, (packs + 31) / 32 * 32));
}

// Where a forward pass leaves its results; null: not wanted.
struct Results {
  Tensor* row_max = nullptr;
  Tensor* row_sum = nullptr;
  Tensor* target_logit = nullptr;
  Tensor* loss = nullptr;
};

// `gradient`: the logits themselves when they are to be overwritten, or null.
void run_forward(
    const Tensor& logits, Tensor* gradient, const Tensor& targets, int64_t ignore, double z_loss, int64_t vocab_start, bool is_whole,
    Shape shape, const Results& results) {
  const cudaStream_t stream = current_stream(logits.get_device_index());
  std::optional<Tensor> losses;
  if (results.loss != nullptr) losses = torch::stable::new_empty(logits, {shape.rows}, ScalarType::Double);
  const auto row_floats = [](Tensor* t) { return t == nullptr ? nullptr : out<float>(*t); };
  with_type(logits, "cross_entropy", [&](auto s) {
    using S = decltype(s);
    const ForwardArgs<S> args{
        in<S>(logits),
        gradient == nullptr ? nullptr : out<S>(*gradient),
        in<int64_t>(targets),
        row_floats(results.row_max),
        row_floats(results.row_sum),
        row_floats(results.target_logit),
        losses.has_value() ? out<double>(*losses) : nullptr,
        shape.vocab,
        vocab_start,
        ignore,
        z_loss,
        is_whole};
    if (shape.rows > 0) {
      DL_LAUNCH(forward_kernel<S>, static_cast<unsigned>(shape.rows), threads_for(shape.vocab, sizeof(S)), 0, stream, args);
    }
  });
  if (results.loss != nullptr)
    DL_LAUNCH(add_losses_kernel, 1u, kLossThreads, 0, stream, in<double>(*losses), out<float>(*results.loss), shape.rows);
}

Shape check_input(const Tensor& logits, const Tensor& targets) {
  const Shape shape = cross_entropy::check_input(logits, targets);
  STD_TORCH_CHECK(shape.rows < (int64_t{1} << 31), "logits ", shape_of(logits), " have too many rows for one launch; divide them");
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cuda(const Tensor& logits, const Tensor& targets, int64_t ignore, double z_loss) {
  const Shape shape = check_input(logits, targets);
  const DeviceGuard guard(logits.get_device_index());
  Tensor loss = torch::stable::new_empty(logits, {}, ScalarType::Float);
  Tensor row_max = cross_entropy::new_per_row(logits);
  Tensor row_sum = cross_entropy::new_per_row(logits);
  run_forward(
      logits, nullptr, targets, ignore, z_loss, 0, true, shape, {.row_max = &row_max, .row_sum = &row_sum, .loss = &loss});
  return {loss, row_max, row_sum};
}

Tensor cross_entropy_grad_cuda(Tensor logits, const Tensor& targets, int64_t ignore, double z_loss) {
  const Shape shape = check_input(logits, targets);
  const DeviceGuard guard(logits.get_device_index());
  Tensor loss = torch::stable::new_empty(logits, {}, ScalarType::Float);
  run_forward(logits, &logits, targets, ignore, z_loss, 0, true, shape, {.loss = &loss});
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_partials_cuda(
    const Tensor& logits, const Tensor& targets, int64_t ignore, int64_t vocab_start) {
  const Shape shape = check_input(logits, targets);
  const DeviceGuard guard(logits.get_device_index());
  Tensor row_max = cross_entropy::new_per_row(logits);
  Tensor row_sum = cross_entropy::new_per_row(logits);
  Tensor target_logit = cross_entropy::new_per_row(logits);
  run_forward(
      logits, nullptr, targets, ignore, 0., vocab_start, false, shape,
      {.row_max = &row_max, .row_sum = &row_sum, .target_logit = &target_logit});
  return {row_max, row_sum, target_logit};
}

Tensor cross_entropy_backward_cuda(
    const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& row_max, const Tensor& row_sum, int64_t ignore,
    double z_loss, int64_t vocab_start) {
  const Shape shape = check_input(logits, targets);
  cross_entropy::check_per_row(row_max, logits, "row_max");
  cross_entropy::check_per_row(row_sum, logits, "row_sum");
  cross_entropy::check_dloss(dloss, logits);
  const DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits.get_device_index());
  Tensor dlogits = torch::stable::empty_like(logits);
  with_type(logits, "cross_entropy", [&](auto s) {
    using S = decltype(s);
    if (shape.rows == 0) return;
    const S* x = in<S>(logits);
    S* dx = out<S>(dlogits);
    const bool packs = reinterpret_cast<uintptr_t>(x) % 16 == reinterpret_cast<uintptr_t>(dx) % 16;
    const BackwardArgs<S> args{
        x,           in<int64_t>(targets), in<float>(row_max), in<float>(row_sum), in<float>(dloss), dx,
        shape.vocab, vocab_start,          ignore,             z_loss,             packs};
    DL_LAUNCH(backward_kernel<S>, static_cast<unsigned>(shape.rows), threads_for(shape.vocab, sizeof(S)), 0, stream, args);
  });
  return dlogits;
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, DL_DEVICE_KEY, m) {
  m.impl("cross_entropy", TORCH_BOX(&dist_llm::cross_entropy_cuda));
  m.impl("cross_entropy_grad_", TORCH_BOX(&dist_llm::cross_entropy_grad_cuda));
  m.impl("cross_entropy_partials", TORCH_BOX(&dist_llm::cross_entropy_partials_cuda));
  m.impl("cross_entropy_backward", TORCH_BOX(&dist_llm::cross_entropy_backward_cuda));
}
