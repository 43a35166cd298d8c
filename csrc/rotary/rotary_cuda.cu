// Rotary position embedding on CUDA; the contract is in rotary.h.
//
// NOT YET RUN ON A GPU: this file compiles for sm_80 and sm_90a (tools/compile_cuda.py) and passes its cases in tests/cuda_emulator; no
// number in the docs comes from it.
//
// Formula   y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin, x1 and x2 the halves of a head.
// Launch    a thread N pairs (i, i + H/2): 16 bytes of either half, or single elements where H, a stride or a pointer does not allow
//           packs; 256 threads a block. Heads of a token follow one another, and find cosines and sines in cache.
// Bound     by memory: x is read and y written once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/cuda_tensors.h"
#include "rotary/rotary.h"

namespace dist_llm {
namespace {

constexpr int kThreads = 256;

template <int N, class S>
__global__ void rotary_kernel(
    const S* __restrict__ x, const float* __restrict__ cos, const float* __restrict__ sin, S* __restrict__ y, const rotary::Shape shape,
    float sign) {
  const int64_t packs = shape.half / N;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / packs, i = index % packs * N;  // row: of all heads of all tokens
  const int64_t token = row / shape.heads, head = row % shape.heads;
  if (token >= shape.batch * shape.tokens) return;
  const int64_t b = token / shape.tokens, t = token % shape.tokens;
  const S* from = x + b * shape.x_strides[0] + t * shape.x_strides[1] + head * shape.x_strides[2] + i;
  S* to = y + row * 2 * shape.half + i;
  float c[N], s[N], x1[N], x2[N], y1[N], y2[N];
  load_floats<N>(cos + b * shape.cos_strides[0] + t * shape.cos_strides[1] + i, c);
  load_floats<N>(sin + b * shape.sin_strides[0] + t * shape.sin_strides[1] + i, s);
  load_floats<N>(from, x1);
  load_floats<N>(from + shape.half, x2);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    y1[j] = x1[j] * c[j] - x2[j] * (sign * s[j]);
    y2[j] = x2[j] * c[j] + x1[j] * (sign * s[j]);
  }
  store_floats<N>(to, y1);
  store_floats<N>(to + shape.half, y2);
}

// Whether packs of `pack` numbers can be read from every offset that these strides lead to.
template <int dims>
bool strides_allow(const int64_t (&strides)[dims], int pack) {
  for (int64_t stride : strides) {
    if (stride % pack != 0) return false;
  }
  return true;
}

Tensor rotary_cuda(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  const rotary::Shape shape = rotary::check_input(x, cos, sin);
  Tensor y = rotary::new_result(x);
  if (x.numel() == 0) return y;
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x.get_device_index());
  with_type(x, "rotary", [&](auto s) {
    using S = decltype(s);
    constexpr int kPack = 16 / sizeof(S);
    const bool packs = shape.half % kPack == 0 && strides_allow(shape.x_strides, kPack) && strides_allow(shape.cos_strides, kPack) &&
                       strides_allow(shape.sin_strides, kPack) && is_aligned(in<S>(x), 16) && is_aligned(out<S>(y), 16) &&
                       is_aligned(in<float>(cos), sizeof(float) * kPack) && is_aligned(in<float>(sin), sizeof(float) * kPack);
    const auto kernel = packs ? rotary_kernel<kPack, S> : rotary_kernel<1, S>;
    const int64_t threads = x.numel() / 2 / (packs ? kPack : 1);
    const unsigned blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
    DL_LAUNCH(
        kernel, blocks, kThreads, 0, stream, in<S>(x), in<float>(cos), in<float>(sin), out<S>(y), shape, inverse ? -1.f : 1.f);
  });
  return y;
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, DL_DEVICE_KEY, m) {
  m.impl("rotary", TORCH_BOX(&dist_llm::rotary_cuda));
}
