// Attention on CUDA, forward and backward; the contract is in attention.h.
//
// NOT YET RUN ON A GPU: this file compiles for sm_80 and sm_90a (tools/compile_cuda.py) and passes its tests emulated
// (tests/cuda_emulator); nothing is known of its speed.
//
// Formula   p = exp(s - lse), out = sum p v;  dv = sum p dout,  ds = p (dout.v - delta) s',  dq = scale sum ds k,  dk = scale sum ds q,
//           delta = dout.out - dlse, s' the derivative of the soft cap.
// Masks     are one interval of keys a query, found by a first kernel, whose ends never fall from query to query: a tile of queries needs the
//           tiles of keys from its first query's begin to its last one's end, and a tile of keys finds its queries by bisection.
// Forward   a block of 128 threads owns 64 queries of a head (fp32: 32). Keys and values pass by, in tiles of 64 (32 at head dims over 128);
//           the next keys arrive while probabilities are computed, the values during the scores.
// Backward  one pass of blocks that own queries (dq) and one of blocks that own keys and one key head (dk, dv, over all its query heads).
//           Scores are computed in both. No atomics: the same bits each time.
// Bound     by tensor cores (bf16, fp16: attention_cuda_mma.cuh) or multiply-adds (fp32: attention_cuda_fp32.cuh).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

#include "attention/attention.h"
#include "attention/attention_cuda_fp32.cuh"
#include "attention/attention_cuda_mma.cuh"
#include "common/cuda_tensors.h"

namespace dist_llm {
namespace {

using attention::Shape;
using attention_cuda::BackwardArgs;
using attention_cuda::ForwardArgs;
using attention_cuda::kThreads;

constexpr int64_t kMaxHeadDim = 256;
constexpr int kRangesThreads = 256;
// Head dims over 128 take more shared memory than sm_86, sm_89 and sm_120 have.
constexpr const char* kInstead = "a head dim of at most 128 needs less, and kernels.attention: sdpa takes any";

struct Ranges {
  Tensor ends;  // (rows, queries, 2), int32
  Tensor is_broken;
  int64_t stride;
};

bool is_empty(const Shape& shape) { return shape.batch * shape.num_queries * shape.num_keys * shape.heads == 0; }

unsigned grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "attention on CUDA: ", blocks, " blocks are too many; divide the batch");
  return static_cast<unsigned>(blocks);
}

int64_t tiles_of(int64_t tokens, int64_t tile) { return (tokens + tile - 1) / tile; }

template <class F>
void with_head_dim(int64_t head_dim, const F& f) {
  if (head_dim <= 64) return f(std::integral_constant<int, 64>{});
  if (head_dim <= 128) return f(std::integral_constant<int, 128>{});
  f(std::integral_constant<int, 256>{});
}

Ranges find_ranges(
    const Tensor& q, const Shape& shape, const std::optional<Tensor>& doc_ids, const std::optional<Tensor>& query_doc_ids, bool causal,
    int64_t window, cudaStream_t stream) {
  const int64_t rows = doc_ids.has_value() ? shape.batch : 1;
  Ranges ranges{
      torch::stable::new_empty(q, {rows, shape.num_queries, 2}, ScalarType::Int), torch::stable::new_empty(q, {rows}, ScalarType::Int),
      doc_ids.has_value() ? shape.num_queries : 0};
  const auto launch = [&](auto type) {
    using I = decltype(type);
    const I* keys = doc_ids.has_value() ? in<I>(*doc_ids) : nullptr;
    const I* queries = query_doc_ids.has_value() ? in<I>(*query_doc_ids) : nullptr;
    DL_LAUNCH(
        attention_cuda::ranges_kernel<I>, grid_of(rows), kRangesThreads, 0, stream, keys, queries,
        reinterpret_cast<int2*>(out<int>(ranges.ends)), out<int>(ranges.is_broken), static_cast<int>(shape.num_queries),
        static_cast<int>(shape.num_keys), causal, window);
  };
  if (doc_ids.has_value() && doc_ids->scalar_type() == ScalarType::Long) {
    launch(int64_t{});
  } else {
    launch(int32_t{});
  }
  return ranges;
}

void copy_strides(const Tensor& t, int64_t (&stride)[3]) {
  for (int64_t i = 0; i < 3; ++i) stride[i] = t.stride(i);
}

// Whether a head of every token begins at a multiple of 16 bytes and has a multiple of 16 bytes.
bool allows_packs(const Tensor& t) {
  const int64_t pack = 16 / t.element_size();
  bool allows = t.size(3) % pack == 0 && is_aligned(t.const_data_ptr(), 16);
  // The stride of a dimension of one entry says nothing: it is never multiplied by more than 0.
  for (int64_t i = 0; i < 3; ++i) allows = allows && (t.size(i) <= 1 || t.stride(i) % pack == 0);
  return allows;
}

template <class S>
void fill_args(
    ForwardArgs<S>& args, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& alibi_slopes, const Shape& shape,
    const Ranges& ranges, double scale, double soft_cap) {
  args.q = in<S>(q);
  args.k = in<S>(k);
  args.v = in<S>(v);
  args.ranges = reinterpret_cast<const int2*>(in<int>(ranges.ends));
  args.range_stride = ranges.stride;
  args.is_broken = in<int>(ranges.is_broken);
  args.slopes = alibi_slopes.has_value() ? in<float>(*alibi_slopes) : nullptr;
  copy_strides(q, args.q_stride);
  copy_strides(k, args.k_stride);
  copy_strides(v, args.v_stride);
  args.num_queries = static_cast<int>(shape.num_queries);
  args.num_keys = static_cast<int>(shape.num_keys);
  args.heads = static_cast<int>(shape.heads);
  args.kv_heads = static_cast<int>(shape.kv_heads);
  args.head_dim = static_cast<int>(shape.head_dim);
  args.scale = static_cast<float>(scale);
  args.soft_cap = static_cast<float>(soft_cap);
  args.packs = allows_packs(q) && allows_packs(k) && allows_packs(v);
}

Shape check_input(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& doc_ids, const std::optional<Tensor>& query_doc_ids,
    const std::optional<Tensor>& alibi_slopes, bool causal, int64_t window, double soft_cap) {
  const Shape shape = attention::check_input(q, k, v, doc_ids, query_doc_ids, alibi_slopes, causal, window, soft_cap);
  STD_TORCH_CHECK(shape.head_dim <= kMaxHeadDim, "attention on CUDA takes head dims up to ", kMaxHeadDim, ", not ", shape.head_dim);
  STD_TORCH_CHECK(shape.num_queries < (1 << 24), "a row of ", shape.num_queries, " queries is too long; at most 16777215");
  return shape;
}

// A result without any key, or without any query.
void fill_empty(Tensor& result, Tensor& lse, cudaStream_t stream) {
  if (result.numel() > 0)
    STD_CUDA_CHECK(cudaMemsetAsync(result.mutable_data_ptr(), 0, static_cast<size_t>(result.numel() * result.element_size()), stream));
  if (lse.numel() > 0) torch::stable::fill_(lse, -__builtin_inf());
}

std::tuple<Tensor, Tensor> attention_cuda_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& doc_ids, const std::optional<Tensor>& query_doc_ids,
    const std::optional<Tensor>& alibi_slopes, bool causal, int64_t window, double scale, double soft_cap, bool fp32_out) {
  const Shape shape = check_input(q, k, v, doc_ids, query_doc_ids, alibi_slopes, causal, window, soft_cap);
  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q.get_device_index());
  const auto type = fp32_out ? ScalarType::Float : q.scalar_type();
  Tensor result = torch::stable::new_empty(q, {shape.batch, shape.num_queries, shape.heads, shape.head_dim}, type);
  Tensor lse = torch::stable::new_empty(q, {shape.batch, shape.heads, shape.num_queries}, ScalarType::Float);
  with_type(q, "attention", [&](auto s) {
    using S = decltype(s);
    if (is_empty(shape)) return fill_empty(result, lse, stream);
    const Ranges ranges = find_ranges(q, shape, doc_ids, query_doc_ids, causal, window, stream);
    ForwardArgs<S> args{};
    fill_args(args, q, k, v, alibi_slopes, shape, ranges, scale, soft_cap);
    args.lse = out<float>(lse);
    if (type == ScalarType::Float) {
      args.out_fp32 = out<float>(result);
    } else {
      args.out = out<S>(result);
    }
    with_head_dim(shape.head_dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      if constexpr (std::is_same_v<S, float>) {
        const auto kernel = attention_cuda::forward_fp32_kernel<kDim>;
        allow_dynamic_shared(kernel, attention_cuda::kForwardBytes32<kDim>, kInstead);
        const int64_t blocks = tiles_of(shape.num_queries, attention_cuda::kRows32) * shape.heads * shape.batch;
        DL_LAUNCH(kernel, grid_of(blocks), kThreads, attention_cuda::kForwardBytes32<kDim>, stream, args);
      } else {
        const auto kernel = attention_cuda::forward_kernel<kDim, S>;
        allow_dynamic_shared(kernel, attention_cuda::kForwardBytes<kDim>, kInstead);
        const int64_t blocks = tiles_of(shape.num_queries, attention_cuda::kQueries) * shape.heads * shape.batch;
        DL_LAUNCH(kernel, grid_of(blocks), kThreads, attention_cuda::kForwardBytes<kDim>, stream, args);
      }
    });
  });
  return {result, lse};
}

// delta: (B, N, T) fp32.
template <class S>
void find_delta(
    const Tensor& dout, const Tensor& result, const std::optional<Tensor>& dlse, Tensor& delta, const Shape& shape, cudaStream_t stream) {
  constexpr int kWarps = 8;
  const int64_t count = shape.batch * shape.heads * shape.num_queries;
  DL_LAUNCH(
      attention_cuda::delta_kernel<S>, grid_of(tiles_of(count, kWarps)), 32 * kWarps, 0, stream, in<S>(dout), in<S>(result),
      dlse.has_value() ? in<float>(*dlse) : nullptr, out<float>(delta), count, static_cast<int>(shape.num_queries),
      static_cast<int>(shape.heads), static_cast<int>(shape.head_dim), dout.stride(0), dout.stride(1), dout.stride(2), result.stride(0),
      result.stride(1), result.stride(2), allows_packs(dout) && allows_packs(result));
}

template <int kDim, class S>
void run_backward(const BackwardArgs<S>& args, const Shape& shape, cudaStream_t stream) {
  if constexpr (std::is_same_v<S, float>) {
    constexpr int kBytes = attention_cuda::kBackwardBytes32<kDim>, kRows = attention_cuda::kRows32;
    const auto of_queries = attention_cuda::backward_q_fp32_kernel<kDim>;
    const auto of_keys = attention_cuda::backward_kv_fp32_kernel<kDim>;
    allow_dynamic_shared(of_queries, kBytes, kInstead);
    allow_dynamic_shared(of_keys, kBytes, kInstead);
    DL_LAUNCH(of_queries, grid_of(tiles_of(shape.num_queries, kRows) * shape.heads * shape.batch), kThreads, kBytes, stream, args);
    DL_LAUNCH(of_keys, grid_of(tiles_of(shape.num_keys, kRows) * shape.kv_heads * shape.batch), kThreads, kBytes, stream, args);
  } else {
    constexpr int kBytes = attention_cuda::kBackwardBytes<kDim>;
    const auto of_queries = attention_cuda::backward_q_kernel<kDim, S>;
    const auto of_keys = attention_cuda::backward_kv_kernel<kDim, S>;
    allow_dynamic_shared(of_queries, kBytes, kInstead);
    allow_dynamic_shared(of_keys, kBytes, kInstead);
    const int64_t query_blocks = tiles_of(shape.num_queries, attention_cuda::kQueries) * shape.heads * shape.batch;
    const int64_t key_blocks = tiles_of(shape.num_keys, attention_cuda::kKeys) * shape.kv_heads * shape.batch;
    const unsigned parts = static_cast<unsigned>(tiles_of(shape.head_dim, attention_cuda::kOwnColumns<kDim>));
    DL_LAUNCH(of_queries, grid_of(query_blocks), kThreads, kBytes, stream, args);
    DL_LAUNCH(of_keys, dim3(grid_of(key_blocks), parts), kThreads, kBytes, stream, args);
  }
}

std::tuple<Tensor, Tensor, Tensor> attention_cuda_backward(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& result,
    const Tensor& lse, const std::optional<Tensor>& doc_ids, const std::optional<Tensor>& query_doc_ids,
    const std::optional<Tensor>& alibi_slopes, bool causal, int64_t window, double scale, double soft_cap, bool fp32_out) {
  const Shape shape = check_input(q, k, v, doc_ids, query_doc_ids, alibi_slopes, causal, window, soft_cap);
  check_same_shape(result, q, "out", "q");
  check_same_shape(dout, q, "dout", "q");
  attention::check_rows(result, q, "out");
  attention::check_rows(dout, q, "dout");
  attention::check_stat(lse, q, shape, "lse");
  if (dlse.has_value()) attention::check_stat(*dlse, q, shape, "dlse");
  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q.get_device_index());
  const auto type = fp32_out ? ScalarType::Float : q.scalar_type();
  Tensor dq = torch::stable::new_empty(q, {shape.batch, shape.num_queries, shape.heads, shape.head_dim}, type);
  Tensor dk = torch::stable::new_empty(k, {shape.batch, shape.num_keys, shape.kv_heads, shape.head_dim}, type);
  Tensor dv = torch::stable::new_empty(v, {shape.batch, shape.num_keys, shape.kv_heads, shape.head_dim}, type);
  with_type(q, "attention", [&](auto s) {
    using S = decltype(s);
    if (is_empty(shape)) {
      for (Tensor* grad : {&dq, &dk, &dv}) {
        if (grad->numel() > 0)
          STD_CUDA_CHECK(cudaMemsetAsync(grad->mutable_data_ptr(), 0, static_cast<size_t>(grad->numel() * grad->element_size()), stream));
      }
      return;
    }
    const Ranges ranges = find_ranges(q, shape, doc_ids, query_doc_ids, causal, window, stream);
    Tensor delta = torch::stable::new_empty(lse, {shape.batch, shape.heads, shape.num_queries}, ScalarType::Float);
    find_delta<S>(dout, result, dlse, delta, shape, stream);
    BackwardArgs<S> args{};
    fill_args<S>(args, q, k, v, alibi_slopes, shape, ranges, scale, soft_cap);
    args.packs = args.packs && allows_packs(dout);
    args.dout = in<S>(dout);
    copy_strides(dout, args.dout_stride);
    args.stats_lse = in<float>(lse);
    args.delta = in<float>(delta);
    if (type == ScalarType::Float) {
      args.dq_fp32 = out<float>(dq);
      args.dk_fp32 = out<float>(dk);
      args.dv_fp32 = out<float>(dv);
    } else {
      args.dq = out<S>(dq);
      args.dk = out<S>(dk);
      args.dv = out<S>(dv);
    }
    with_head_dim(shape.head_dim, [&](auto dim) { run_backward<decltype(dim)::value, S>(args, shape, stream); });
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, DL_DEVICE_KEY, m) {
  m.impl("attention", TORCH_BOX(&dist_llm::attention_cuda_forward));
  m.impl("attention_backward", TORCH_BOX(&dist_llm::attention_cuda_backward));
}
