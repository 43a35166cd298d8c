// The choice of experts on CUDA, forward and backward; the contract is in moe.h.
//
// NOT YET RUN ON A GPU: this file compiles for sm_80 and sm_90a (tools/compile_cuda.py) and runs in the emulator (tests/cuda_emulator); no
// number in the docs comes from it.
//
// Formula   p = softmax(x) or 1 / (1 + e^-x); the k best of x, or of p + bias inside the best groups, in the order (value falling, a NaN
//           first; then number rising). In that order each choice is the first after the one before, so that nothing has to be marked.
// Geometry  a warp for a token, kWarps of them in a block, blocks striding over the tokens. A row's values and scores are in
//           shared memory; lane l has the experts l, l + 32, ... Choices are counted in shared memory, then added to the result, in
//           whole numbers: the order does not matter.
// Bound     by memory (reads logits, writes probabilities) for few choices; k scans of a row in shared memory for many.
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

using moe::Options;
using moe::RouteShape;

constexpr int kWarps = 4;
constexpr int64_t kMaxBlocks = 2048;
constexpr int kMaxSharedBytes = 96 * 1024;  // opt-in shared memory that sm_80 and all later chips of this line have
constexpr unsigned kAll = 0xffffffffu;
constexpr float kLeast = 1e-25f;  // a sum of exponentials below it has lost its digits

// A value and its number. Its order of choice: a NaN first, then the larger, then the lower number. `none` comes after all.
struct Candidate {
  float value;
  int number;
};

__device__ inline Candidate none() { return {-INFINITY, INT_MAX}; }

__device__ inline bool is_before(const Candidate& a, const Candidate& b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan;
  if (a_nan || a.value == b.value) return a.number < b.number;
  return a.value > b.value;
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(kAll, value, offset));
  return value;
}

// The first of n values after `previous` (with is_first, of all), given to all lanes.
__device__ inline Candidate next_choice(const float* values, int n, const Candidate& previous, bool is_first) {
  Candidate best = none();
  for (int i = threadIdx.x % 32; i < n; i += 32) {
    const Candidate here{values[i], i};
    if ((is_first || is_before(previous, here)) && is_before(here, best)) best = here;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Candidate other{__shfl_xor_sync(kAll, best.value, offset), __shfl_xor_sync(kAll, best.number, offset)};
    if (is_before(other, best)) best = other;
  }
  return best;
}

// The sum of the two best of n values, or the only one.
__device__ inline float best_two(const float* values, int n) {
  Candidate first = none(), second = none();
  for (int i = 0; i < n; ++i) {
    const Candidate here{values[i], i};
    if (is_before(here, first)) {
      second = first;
      first = here;
    } else if (is_before(here, second)) {
      second = here;
    }
  }
  return n == 1 ? first.value : first.value + second.value;
}

template <class S>
__global__ void __launch_bounds__(32 * kWarps) route_kernel(
    const S* __restrict__ logits, const float* __restrict__ bias, float* __restrict__ weights, int32_t* __restrict__ chosen,
    float* __restrict__ probabilities, int32_t* __restrict__ counts, int64_t tokens, int experts, Options options) {
  DL_DYNAMIC_SHARED(float, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  int32_t* counted = reinterpret_cast<int32_t*>(shared);
  float* values = shared + experts + warp * (2 * experts + options.groups);
  float* scores = values + experts;
  float* group_scores = scores + experts;
  for (int i = threadIdx.x; i < experts; i += blockDim.x) counted[i] = 0;
  __syncthreads();

  const int top_k = static_cast<int>(options.top_k), groups = static_cast<int>(options.groups);
  const bool by_logit = bias == nullptr && groups == 1;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * warps + warp; token < tokens; token += static_cast<int64_t>(gridDim.x) * warps) {
    const S* row = logits + token * experts;
    float* p = probabilities + token * experts;
    int32_t* chosen_here = chosen + token * top_k;
    __syncwarp();  // the row before is no longer read
    if (options.sigmoid) {
      for (int i = lane; i < experts; i += 32) {
        const float x = to_float(row[i]);
        const float e = expf(-fabsf(x));
        scores[i] = (x < 0.f ? e : 1.f) / (1.f + e);
      }
    } else {
      float max = -INFINITY;
      for (int i = lane; i < experts; i += 32) max = fmaxf(max, to_float(row[i]));
      max = warp_max(max);
      for (int i = lane; i < experts; i += 32) scores[i] = expf(to_float(row[i]) - max);
    }
    float sum = 1.f;
    if (!options.sigmoid) {
      sum = 0.f;
      for (int i = lane; i < experts; i += 32) sum += scores[i];
      sum = warp_sum(sum);
    }
    for (int i = lane; i < experts; i += 32) {
      const float probability = scores[i] / sum;
      p[i] = probability;
      values[i] = by_logit ? to_float(row[i]) : probability + (bias == nullptr ? 0.f : bias[i]);
    }
    __syncwarp();

    if (groups > 1) {
      const int size = experts / groups;
      for (int g = lane; g < groups; g += 32) group_scores[g] = best_two(values + g * size, size);
      __syncwarp();
      Candidate last = none();
      for (int kept = 0; kept < options.groups_kept; ++kept) last = next_choice(group_scores, groups, last, kept == 0);
      for (int i = lane; i < experts; i += 32) {
        if (is_before(last, Candidate{group_scores[i / size], i / size})) values[i] = -INFINITY;
      }
      __syncwarp();
    }

    Candidate last = none();
    float chosen_sum = 0.f;
    for (int j = 0; j < top_k; ++j) {
      last = next_choice(values, experts, last, j == 0);
      chosen_sum += scores[last.number];
      if (lane == 0) {
        chosen_here[j] = last.number;
        atomicAdd(&counted[last.number], 1);
      }
    }
    __syncwarp();  // chosen_here is written
    const bool softmax_of_chosen = options.normalize && !options.sigmoid;
    const bool anew = softmax_of_chosen && chosen_sum < kLeast;
    float max = -INFINITY;
    if (anew) {
      for (int j = 0; j < top_k; ++j) max = fmaxf(max, to_float(row[chosen_here[j]]));
      chosen_sum = 0.f;
      for (int j = 0; j < top_k; ++j) chosen_sum += expf(to_float(row[chosen_here[j]]) - max);
    }
    float divisor = sum;
    if (options.normalize) divisor = options.sigmoid ? chosen_sum + moe::kSigmoidFloor : chosen_sum;
    for (int j = lane; j < top_k; j += 32) {
      const int expert = chosen_here[j];
      const float score = anew ? expf(to_float(row[expert]) - max) : scores[expert];
      weights[token * top_k + j] = score / divisor * options.scale;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < experts; i += blockDim.x) {
    if (counted[i] > 0) atomicAdd(&counts[i], counted[i]);
  }
}

template <class S>
__global__ void __launch_bounds__(32 * kWarps) route_backward_kernel(
    const float* __restrict__ dweights, const float* __restrict__ dprobabilities, const float* __restrict__ weights,
    const int32_t* __restrict__ chosen, const float* __restrict__ probabilities, S* __restrict__ dlogits, int64_t tokens, int experts,
    int top_k, bool sigmoid, bool normalize, float scale) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32;
  if (token >= tokens) return;
  const float* p = probabilities + token * experts;
  const float* dp = dprobabilities == nullptr ? nullptr : dprobabilities + token * experts;
  const float* w = weights + token * top_k;
  const float* dw = dweights == nullptr ? nullptr : dweights + token * top_k;
  const int32_t* chosen_here = chosen + token * top_k;
  S* out = dlogits + token * experts;

  // Through weights: with normalize they add up to scale, and along them the gradient is taken out.
  float along_weights = 0.f, chosen_sum = 0.f, along_p = 0.f;
  if (dw != nullptr) {
    for (int j = lane; j < top_k; j += 32) {
      const int expert = chosen_here[j];
      if (expert < 0 || expert >= experts) continue;
      chosen_sum += p[expert];
      along_weights += dw[j] * (w[j] / scale);
      along_p += p[expert] * (dw[j] * scale);
    }
  }
  if (normalize) along_p = 0.f;
  // Through a softmax the sum of p * gradient is taken out of all.
  if (dp != nullptr) {
    for (int i = lane; i < experts; i += 32) along_p += p[i] * dp[i];
  }
  along_weights = warp_sum(along_weights);
  chosen_sum = warp_sum(chosen_sum);
  along_p = warp_sum(along_p);

  for (int i = lane; i < experts; i += 32) {
    const float g = dp == nullptr ? 0.f : dp[i];
    from_float(p[i] * (sigmoid ? g * (1.f - p[i]) : g - along_p), out + i);
  }
  if (dw == nullptr) return;
  __syncwarp();  // the chosen ones are written again, by other lanes
  for (int j = lane; j < top_k; j += 32) {
    const int expert = chosen_here[j];
    if (expert < 0 || expert >= experts) continue;
    const float pc = p[expert];
    float g = dp == nullptr ? 0.f : dp[expert];
    float d = 0.f;
    if (sigmoid) {
      g += normalize ? scale * (dw[j] - along_weights) / (chosen_sum + moe::kSigmoidFloor) : scale * dw[j];
      d = g * pc * (1.f - pc);
    } else if (normalize) {
      d = pc * (g - along_p) + w[j] * (dw[j] - along_weights);
    } else {
      d = pc * (g + scale * dw[j] - along_p);
    }
    from_float(d, out + expert);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_route_cuda(
    const Tensor& logits, const std::optional<Tensor>& bias, int64_t top_k, bool sigmoid, int64_t groups, int64_t groups_kept,
    bool normalize, double scale) {
  const Options options{top_k, sigmoid, groups, groups_kept, normalize, static_cast<float>(scale)};
  const RouteShape shape = moe::check_route(logits, bias, options);
  const DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits.get_device_index());
  Tensor weights = torch::stable::new_empty(logits, {shape.tokens, top_k}, ScalarType::Float);
  Tensor experts = torch::stable::new_empty(logits, {shape.tokens, top_k}, ScalarType::Int);
  Tensor probabilities = torch::stable::new_empty(logits, {shape.tokens, shape.experts}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(logits, {shape.experts}, ScalarType::Int);
  STD_CUDA_CHECK(cudaMemsetAsync(out<int32_t>(counts), 0, static_cast<size_t>(shape.experts) * sizeof(int32_t), stream));
  if (shape.tokens == 0) return {weights, experts, probabilities, counts};

  const int64_t count_bytes = shape.experts * 4, warp_bytes = (2 * shape.experts + groups) * 4;
  const int64_t warps = std::min<int64_t>(kWarps, (kMaxSharedBytes - count_bytes) / warp_bytes);
  STD_TORCH_CHECK(warps >= 1, "logits ", shape_of(logits), " have more experts than the shared memory of a block holds");
  const int64_t blocks = std::min((shape.tokens + warps - 1) / warps, kMaxBlocks);
  with_type(logits, "moe_route", [&](auto s) {
    using S = decltype(s);
    const auto kernel = route_kernel<S>;
    allow_dynamic_shared(kernel, kMaxSharedBytes);
    DL_LAUNCH(
        kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(32 * warps), static_cast<size_t>(count_bytes + warps * warp_bytes),
        stream, in<S>(logits), bias.has_value() ? in<float>(*bias) : nullptr, out<float>(weights), out<int32_t>(experts),
        out<float>(probabilities), out<int32_t>(counts), shape.tokens, static_cast<int>(shape.experts), options);
  });
  return {weights, experts, probabilities, counts};
}

Tensor moe_route_backward_cuda(
    const std::optional<Tensor>& dweights, const std::optional<Tensor>& dprobabilities, const Tensor& weights, const Tensor& experts,
    const Tensor& probabilities, bool sigmoid, bool normalize, double scale, ScalarType dtype) {
  const RouteShape shape = moe::check_route_backward(dweights, dprobabilities, weights, experts, probabilities);
  const DeviceGuard guard(probabilities.get_device_index());
  const cudaStream_t stream = current_stream(probabilities.get_device_index());
  Tensor dlogits = torch::stable::new_empty(probabilities, {shape.tokens, shape.experts}, dtype);
  if (shape.tokens == 0) return dlogits;
  with_type(dlogits, "moe_route", [&](auto s) {
    using S = decltype(s);
    const auto kernel = route_backward_kernel<S>;
    DL_LAUNCH(
        kernel, static_cast<unsigned>((shape.tokens + kWarps - 1) / kWarps), 32 * kWarps, 0, stream,
        dweights.has_value() ? in<float>(*dweights) : nullptr, dprobabilities.has_value() ? in<float>(*dprobabilities) : nullptr,
        in<float>(weights), in<int32_t>(experts), in<float>(probabilities), out<S>(dlogits), shape.tokens,
        static_cast<int>(shape.experts), static_cast<int>(weights.size(1)), sigmoid, normalize, static_cast<float>(scale));
  });
  return dlogits;
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, DL_DEVICE_KEY, m) {
  m.impl("moe_route", TORCH_BOX(&dist_llm::moe_route_cuda));
  m.impl("moe_route_backward", TORCH_BOX(&dist_llm::moe_route_backward_cuda));
}
