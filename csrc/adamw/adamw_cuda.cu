// AdamW on CUDA; the contract is in adamw.h.
//
// NOT YET RUN ON A GPU: this file compiles for sm_80 and sm_90a (tools/compile_cuda.py) and gives right results in tests/cuda_emulator;
// no number in the docs comes from it.
//
// Formula   g = s grad,  m += (1 - b1) (g - m),  v = b2 v + (1 - b2) g^2,  p = (1 - lr wd) p - lr / c1 m / (sqrt(v) / sqrt(c2) + eps),  copy = p.
// Launch    one for up to kMaxTensors tensors: their pointers travel among the kernel's arguments (27 KB of the 32 KB that there are from
//           CUDA 12.1 on), so that no table is copied to the device and nothing waits. A block takes kPiece elements of one tensor, which it finds
//           by bisection; a thread takes packs of 4 elements: 16 bytes of each fp32 stream; single ones where a pointer does not allow packs.
// Sum       the same pieces, squares added in fp64: a number a piece, then one block adds the pieces in a fixed order: the same bits each time.
// Bound     by memory: an update reads 4 numbers and writes 3 (and a copy) for each parameter.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "adamw/adamw.h"
#include "common/cuda_tensors.h"

namespace dist_llm {
namespace {

using adamw::Constants;

constexpr int kThreads = 256;
constexpr int kPack = 4;
constexpr int64_t kPiece = 8192;
constexpr int kMaxTensors = 512;

// Which tensor a block works on: tensor t has the blocks first_block[t] to first_block[t + 1].
struct Division {
  int count;
  int first_block[kMaxTensors + 1];
  int64_t size[kMaxTensors];
};

template <class G, class C>
struct UpdateTable {
  Division division;
  float* param[kMaxTensors];
  const G* grad[kMaxTensors];
  float* exp_avg[kMaxTensors];
  float* exp_avg_sq[kMaxTensors];
  C* copy[kMaxTensors];  // null: there is none
};

template <class S>
struct SumTable {
  Division division;
  const S* tensor[kMaxTensors];
};

struct Place {
  int tensor;
  int64_t begin;
  int64_t end;
};

__device__ inline Place place_of_block(const Division& division) {
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = division.count;  // first_block[low] <= block < first_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (division.first_block[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  const int64_t begin = (block - division.first_block[low]) * kPiece;
  const int64_t end = begin + kPiece < division.size[low] ? begin + kPiece : division.size[low];
  return {low, begin, end};
}

__device__ inline bool are_aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <int N, class G, class C>
__device__ inline void update(const Constants& k, float scale, float* p, const G* g, float* m, float* v, C* copy) {
  float param[N], grad[N], exp_avg[N], exp_avg_sq[N];
  load_floats<N>(p, param);
  load_floats<N>(g, grad);
  load_floats<N>(m, exp_avg);
  load_floats<N>(v, exp_avg_sq);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float scaled = grad[j] * scale;
    const float step = scaled - exp_avg[j];
    // Two forms of lerp, as torch has them: exact at either end.
    exp_avg[j] = k.weight1 < 0.5f ? exp_avg[j] + k.weight1 * step : scaled + (k.weight1 - 1.f) * step;
    exp_avg_sq[j] = exp_avg_sq[j] * k.beta2 + k.weight2 * scaled * scaled;
    const float denominator = sqrtf(exp_avg_sq[j]) / k.correction + k.eps;
    param[j] = param[j] * k.decay - k.step_size * exp_avg[j] / denominator;
  }
  store_floats<N>(p, param);
  store_floats<N>(m, exp_avg);
  store_floats<N>(v, exp_avg_sq);
  if (copy != nullptr) store_floats<N>(copy, param);
}

template <class G, class C>
__global__ void update_kernel(const UpdateTable<G, C> table, const Constants constants, const float* __restrict__ grad_scale) {
  const Place place = place_of_block(table.division);
  float* const p = table.param[place.tensor];
  const G* const g = table.grad[place.tensor];
  float* const m = table.exp_avg[place.tensor];
  float* const v = table.exp_avg_sq[place.tensor];
  C* const copy = table.copy[place.tensor];
  const float scale = *grad_scale;
  const bool packs = are_aligned(p, sizeof(float) * kPack) && are_aligned(m, sizeof(float) * kPack) && are_aligned(v, sizeof(float) * kPack) &&
                     are_aligned(g, sizeof(G) * kPack) && are_aligned(copy, sizeof(C) * kPack);
  // A piece begins at a multiple of a pack; what the last pack of a tensor does not fill is done singly.
  const int64_t whole = packs ? place.end - (place.end - place.begin) % kPack : place.begin;
  for (int64_t i = place.begin + threadIdx.x * kPack; i < whole; i += kThreads * kPack)
    update<kPack>(constants, scale, p + i, g + i, m + i, v + i, copy == nullptr ? copy : copy + i);
  for (int64_t i = whole + threadIdx.x; i < place.end; i += kThreads)
    update<1>(constants, scale, p + i, g + i, m + i, v + i, copy == nullptr ? copy : copy + i);
}

// The sum over all kThreads threads of a block, in a fixed order; only thread 0 has it.
__device__ inline double block_sum_of(double value) {
  __shared__ double sums[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += sums[warp];
  return total;
}

template <class S>
__global__ void squares_kernel(const SumTable<S> table, double* __restrict__ sums) {
  const Place place = place_of_block(table.division);
  const S* const x = table.tensor[place.tensor];
  constexpr int kWide = 16 / sizeof(S);
  const int64_t whole = are_aligned(x, 16) ? place.end - (place.end - place.begin) % kWide : place.begin;
  double sum = 0.;
  for (int64_t i = place.begin + threadIdx.x * kWide; i < whole; i += kThreads * kWide) {
    float values[kWide];
    load_floats<kWide>(x + i, values);
#pragma unroll
    for (int j = 0; j < kWide; ++j) sum += static_cast<double>(values[j]) * static_cast<double>(values[j]);
  }
  for (int64_t i = whole + threadIdx.x; i < place.end; i += kThreads) {
    const double value = to_float(x[i]);
    sum += value * value;
  }
  sum = block_sum_of(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void add_kernel(const double* __restrict__ sums, int64_t count, double* __restrict__ total) {
  double sum = 0.;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += sums[i];
  sum = block_sum_of(sum);
  if (threadIdx.x == 0) *total = sum;
}

int64_t pieces_of(const Tensor& t) { return (t.numel() + kPiece - 1) / kPiece; }

// Enters a tensor, unless it is empty or its blocks would be too many; its number, or -1.
int enter(Division& division, const Tensor& t) {
  const int number = division.count;
  const int64_t end = division.first_block[number] + pieces_of(t);
  STD_TORCH_CHECK(end < (int64_t{1} << 31), "a list of tensors with more than 2^31 pieces of ", kPiece, " elements cannot be launched at once");
  division.size[number] = t.numel();
  division.first_block[number + 1] = static_cast<int>(end);
  division.count = number + 1;
  return number;
}

template <class F>
void with_copies(const std::vector<Tensor>& copies, const F& f) {
  if (copies.empty() || copies[0].scalar_type() == ScalarType::BFloat16) return f(__nv_bfloat16{});
  if (copies[0].scalar_type() == ScalarType::Half) return f(__half{});
  STD_TORCH_CHECK(false, "adamw_step on CUDA writes copies in bf16 or fp16, not ", torch::headeronly::toString(copies[0].scalar_type()));
}

void adamw_step_cuda(
    std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
    std::vector<Tensor> copies, const Tensor& grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay, double step) {
  const Constants constants = adamw::constants_of(lr, beta1, beta2, eps, weight_decay, step);
  if (params.empty()) return;
  adamw::check_lists({params, grads, exp_avgs, exp_avg_sqs, copies}, grad_scale);
  const DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0].get_device_index());
  with_type(grads[0], "adamw_step", [&](auto g) {
    with_copies(copies, [&](auto c) {
      using G = decltype(g);
      using C = decltype(c);
      const auto kernel = update_kernel<G, C>;
      UpdateTable<G, C> table{};
      const auto launch = [&]() {
        const int blocks = table.division.first_block[table.division.count];
        if (blocks > 0) DL_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, table, constants, in<float>(grad_scale));
        table.division.count = 0;
      };
      for (size_t i = 0; i < params.size(); ++i) {
        if (params[i].numel() == 0) continue;
        if (table.division.count == kMaxTensors) launch();
        const int t = enter(table.division, params[i]);
        table.param[t] = out<float>(params[i]);
        table.grad[t] = in<G>(grads[i]);
        table.exp_avg[t] = out<float>(exp_avgs[i]);
        table.exp_avg_sq[t] = out<float>(exp_avg_sqs[i]);
        table.copy[t] = copies.empty() ? nullptr : out<C>(copies[i]);
      }
      launch();
    });
  });
}

// Sums of the pieces of all tensors of type S, from sums + begin on; returns where they end.
template <class S>
int64_t sum_pieces(const std::vector<Tensor>& tensors, ScalarType type, double* sums, int64_t begin, cudaStream_t stream) {
  const auto kernel = squares_kernel<S>;
  SumTable<S> table{};
  const auto launch = [&]() {
    const int blocks = table.division.first_block[table.division.count];
    if (blocks > 0) DL_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, table, sums + begin);
    begin += blocks;
    table.division.count = 0;
  };
  for (const Tensor& t : tensors) {
    if (t.numel() == 0 || t.scalar_type() != type) continue;
    if (table.division.count == kMaxTensors) launch();
    const int number = enter(table.division, t);
    table.tensor[number] = in<S>(t);
  }
  launch();
  return begin;
}

Tensor sum_of_squares_cuda(std::vector<Tensor> tensors) {
  adamw::check_tensors(tensors);
  int64_t pieces = 0;
  for (const Tensor& t : tensors) {
    with_type(t, "sum_of_squares", [](auto) {});
    pieces += pieces_of(t);
  }
  const DeviceGuard guard(tensors[0].get_device_index());
  const cudaStream_t stream = current_stream(tensors[0].get_device_index());
  Tensor partials = torch::stable::new_empty(tensors[0], {std::max<int64_t>(1, pieces)}, ScalarType::Double);
  double* sums = out<double>(partials);
  int64_t done = sum_pieces<float>(tensors, ScalarType::Float, sums, 0, stream);
  done = sum_pieces<__nv_bfloat16>(tensors, ScalarType::BFloat16, sums, done, stream);
  done = sum_pieces<__half>(tensors, ScalarType::Half, sums, done, stream);
  Tensor result = torch::stable::new_empty(tensors[0], {}, ScalarType::Double);
  DL_LAUNCH(add_kernel, 1, kThreads, 0, stream, in<double>(partials), done, out<double>(result));
  return result;
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, DL_DEVICE_KEY, m) {
  m.impl("adamw_step", TORCH_BOX(&dist_llm::adamw_step_cuda));
  m.impl("sum_of_squares", TORCH_BOX(&dist_llm::sum_of_squares_cuda));
}
