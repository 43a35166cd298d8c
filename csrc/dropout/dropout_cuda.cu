// Dropout on CUDA; the contract is in dropout.h, the mask in keep_cuda.cuh.
//
// NOT YET RUN ON A GPU: this file compiles for sm_80 and sm_90a (tools/compile_cuda.py) and passes its cases in tests/cuda_emulator; no
// number in the docs comes from it.
//
// Formula   y = (residual +) (kept ? x / (1 - p) : 0), kept by Philox 4x32-10 of (feature / 4, column, sample).
// Launch    a thread a pack of 16 bytes (4 or 8 elements: one or two counters), or a single element where D or a pointer does not allow
//           packs; 256 threads a block.
// Bound     by memory on paper: x (and residual) are read and y is written; ten rounds of Philox are 40 multiplications a counter.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/cuda_tensors.h"
#include "dropout/dropout.h"
#include "dropout/keep_cuda.cuh"

namespace dist_llm {
namespace {

constexpr int kThreads = 256;

template <int N, class S>
__global__ void dropout_kernel(
    const S* __restrict__ x, const S* __restrict__ residual, S* __restrict__ y, const dropout::Mask mask, int64_t rows, int64_t dim) {
  const int64_t start = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (start >= rows * dim) return;
  const int64_t row = start / dim, i = start % dim;
  const uint32_t keep = keep_elements<N>(mask, row, i);
  float value[N], sum[N];
  load_floats<N>(x + start, value);
#pragma unroll
  for (int j = 0; j < N; ++j) sum[j] = 0.f;
  if (residual != nullptr) load_floats<N>(residual + start, sum);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    // Product and sum are rounded one after the other, as the reference rounds them: a fused multiply-add would give other bits.
    const float scaled = (keep >> j & 1u) != 0 ? __fmul_rn(value[j], mask.scale) : 0.f;
    value[j] = residual == nullptr ? scaled : __fadd_rn(sum[j], scaled);
  }
  store_floats<N>(y + start, value);
}

Tensor run(const Tensor& x, const Tensor* residual, const dropout::Mask& mask) {
  check_contiguous(x, "x");
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x.get_device_index());
  with_type(x, "dropout", [&](auto s) {
    using S = decltype(s);
    constexpr int kPack = 16 / sizeof(S);
    const int64_t rows = x.size(0) * x.size(1), dim = x.size(2);
    const S* added = residual == nullptr ? nullptr : in<S>(*residual);
    const bool packs = dim % kPack == 0 && is_aligned(in<S>(x), 16) && is_aligned(added, 16) && is_aligned(out<S>(y), 16);
    const auto kernel = packs ? dropout_kernel<kPack, S> : dropout_kernel<1, S>;
    const int64_t a_block = static_cast<int64_t>(kThreads) * (packs ? kPack : 1);
    const unsigned blocks = static_cast<unsigned>((rows * dim + a_block - 1) / a_block);
    DL_LAUNCH(kernel, blocks, kThreads, 0, stream, in<S>(x), added, out<S>(y), mask, rows, dim);
  });
  return y;
}

Tensor dropout_cuda(
    const Tensor& x, double p, int64_t key0, int64_t key1, const Tensor& samples, const Tensor& columns, int64_t feature_start) {
  return run(x, nullptr, dropout::make_mask(x, p, key0, key1, samples, columns, feature_start));
}

Tensor dropout_add_cuda(
    const Tensor& x, const Tensor& residual, double p, int64_t key0, int64_t key1, const Tensor& samples, const Tensor& columns,
    int64_t feature_start) {
  dropout::check_residual(residual, x);
  return run(x, &residual, dropout::make_mask(x, p, key0, key1, samples, columns, feature_start));
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, DL_DEVICE_KEY, m) {
  m.impl("dropout", TORCH_BOX(&dist_llm::dropout_cuda));
  m.impl("dropout_add", TORCH_BOX(&dist_llm::dropout_add_cuda));
}
