// Attention on CPU, forward and backward; the contract is in attention.h, the kernels in attention_rows.inc and attention_tiles.inc.
#include "attention/attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

// GCC 12's own AVX-512 headers warn, where they are inlined, about their deliberately undefined registers.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "attention/lanes.h"
#include "common/isa.h"

namespace dist_llm::attention {

// A block of scores: its lanes are queries, its rows keys. Both are multiples of what every instruction set packs.
constexpr int64_t kBlockQueries = 64;
constexpr int64_t kBlockKeys = 128;

template <class S>
struct ForwardArgs {
  const S* q;
  const S* k;
  const S* v;
  S* out;
  float* out_fp32;  // written instead of out when not null
  float* lse;
  const float* lo;  // keys that each query sees, from lo to hi - 1; padded to whole blocks of queries with the last query's
  const float* hi;
  const float* slopes;  // null: no ALiBi
  int64_t range_stride;  // from one row of the batch to the next in lo and hi
  int64_t q_stride[3], k_stride[3], v_stride[3];  // of row of the batch, token, head
  int64_t num_queries, num_keys, heads, kv_heads, head_dim;
  int64_t parts;  // tasks that share the query heads of one key and value head
  float scale, soft_cap;
};

template <class S>
struct BackwardArgs : ForwardArgs<S> {
  const S* dout;
  const float* dlse;  // null: zero
  const S* out;
  const float* lse;
  S* dq;
  S* dk;
  S* dv;
  float* dq_fp32;  // written instead of dq, dk and dv when not null
  float* dk_fp32;
  float* dv_fp32;
  float* dk_parts;  // of every part, when there are several
  float* dv_parts;
  int64_t out_stride[3], dout_stride[3];
};

}  // namespace dist_llm::attention

#define DL_ISA_SOURCE "attention/attention_rows.inc"
#include "common/foreach_isa.h"

#if defined(__x86_64__)
namespace dist_llm::avx512_bf16 {
namespace {
#define DL_KERNEL __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
using V = VecAvx512Bf16;
#include DL_ISA_SOURCE
#undef DL_KERNEL
}  // namespace
}  // namespace dist_llm::avx512_bf16
#endif

namespace dist_llm {
namespace {

using attention::BackwardArgs;
using attention::ForwardArgs;
using attention::kBlockKeys;
using attention::kBlockQueries;
using attention::Shape;

// Tasks there should at least be, where heads allow it: a key and value head with many query heads is divided among several.
constexpr int64_t kMinTasks = 16;
// Queries that are not worth packing keys and values for.
constexpr int64_t kFewQueries = 2;
// Products of a query and a key, times head dim, that a thread should have before another one is worth waking.
constexpr int64_t kGrain = 1 << 17;

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* out(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Zeros are zero bits in every dtype here.
void fill_zeros(Tensor& t) {
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, static_cast<size_t>(t.numel() * t.element_size()));
}

template <class F>
void with_type(const Tensor& q, const F& f) {
  if (q.scalar_type() == ScalarType::Float) return f(float{});
  if (q.scalar_type() == ScalarType::BFloat16) return f(bf16{});
  STD_TORCH_CHECK(false, "attention on CPU takes q in fp32 or bf16, not ", torch::headeronly::toString(q.scalar_type()));
}

// DL_PER_ISA with the products of bf16 pairs where the storage type S and the processor have them.
#if defined(__x86_64__)
#define DL_PER_DOT(...)                                       \
  if constexpr (sizeof(S) == sizeof(bf16)) {                  \
    if (multiplies_bf16()) {                                  \
      avx512_bf16::__VA_ARGS__;                               \
    } else {                                                  \
      DL_PER_ISA(__VA_ARGS__)                                 \
    }                                                         \
  } else {                                                    \
    DL_PER_ISA(__VA_ARGS__)                                   \
  }
#else
#define DL_PER_DOT(...) DL_PER_ISA(__VA_ARGS__);
#endif

struct Free {
  void operator()(float* p) const { std::free(p); }
};

using Scratch = std::unique_ptr<float, Free>;

// Aligned to cache lines, uninitialised.
Scratch new_scratch(int64_t words) {
  void* p = std::aligned_alloc(64, static_cast<size_t>((words + 15) / 16 * 16) * sizeof(float));
  if (p == nullptr) throw std::bad_alloc();
  return Scratch(static_cast<float*>(p));
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The keys each query sees, one interval each.
struct Ranges {
  std::vector<float> lo, hi;
  int64_t stride = 0;
};

template <class I>
void check_order(const I* ids, int64_t row, int64_t count, const char* name) {
  for (int64_t j = 1; j < count; ++j) {
    STD_TORCH_CHECK(
        ids[j] >= ids[j - 1], name, " must not fall along a row: row ", row, " has ", ids[j - 1], " before ", ids[j], " at token ", j);
  }
}

// Where the document of each token begins and ends.
template <class I>
void find_documents(const I* ids, int64_t num_keys, std::vector<int64_t>& begin, std::vector<int64_t>& end) {
  for (int64_t j = 0; j < num_keys; ++j) begin[j] = j > 0 && ids[j] == ids[j - 1] ? begin[j - 1] : j;
  for (int64_t j = num_keys - 1; j >= 0; --j) end[j] = j + 1 < num_keys && ids[j] == ids[j + 1] ? end[j + 1] : j + 1;
}

template <class F>
void with_ids(const Tensor& ids, const F& f) {
  if (ids.scalar_type() == ScalarType::Int) return f(int32_t{});
  return f(int64_t{});
}

// Queries whose documents are their own: each sees the keys of equal id. Where there are none the range is empty, and stands where
// they would be, so that the ends of ranges still never fall.
Ranges match_documents(const Shape& shape, const Tensor& doc_ids, const Tensor& query_doc_ids) {
  const int64_t padded = round_up(shape.num_queries, kBlockQueries);
  Ranges ranges{std::vector<float>(shape.batch * padded), std::vector<float>(shape.batch * padded), padded};
  with_ids(doc_ids, [&](auto type) {
    using I = decltype(type);
    for (int64_t row = 0; row < shape.batch; ++row) {
      const I* keys = in<I>(doc_ids) + row * shape.num_keys;
      const I* queries = in<I>(query_doc_ids) + row * shape.num_queries;
      check_order(keys, row, shape.num_keys, "doc_ids");
      check_order(queries, row, shape.num_queries, "query_doc_ids");
      int64_t lo = 0, hi = 0;
      for (int64_t i = 0; i < padded; ++i) {
        const I id = queries[std::min(i, shape.num_queries - 1)];
        while (lo < shape.num_keys && keys[lo] < id) ++lo;
        while (hi < shape.num_keys && keys[hi] <= id) ++hi;
        ranges.lo[row * padded + i] = static_cast<float>(lo);
        ranges.hi[row * padded + i] = static_cast<float>(hi);
      }
    }
  });
  return ranges;
}

Ranges find_ranges(
    const Shape& shape, const std::optional<Tensor>& doc_ids, const std::optional<Tensor>& query_doc_ids, bool causal, int64_t window) {
  if (query_doc_ids.has_value()) return match_documents(shape, *doc_ids, *query_doc_ids);
  window = std::min(window, shape.num_keys);  // one that covers all keys; 0 stays 0, and no sum with a position overflows
  const int64_t rows = doc_ids.has_value() ? shape.batch : 1;
  const int64_t padded = round_up(shape.num_queries, kBlockQueries);
  Ranges ranges{std::vector<float>(rows * padded), std::vector<float>(rows * padded), doc_ids.has_value() ? padded : 0};
  std::vector<int64_t> begin(doc_ids.has_value() ? shape.num_keys : 0), end(begin.size());
  for (int64_t row = 0; row < rows; ++row) {
    if (doc_ids.has_value()) {
      with_ids(*doc_ids, [&](auto type) {
        const auto* ids = in<decltype(type)>(*doc_ids) + row * shape.num_keys;
        check_order(ids, row, shape.num_keys, "doc_ids");
        find_documents(ids, shape.num_keys, begin, end);
      });
    }
    for (int64_t i = 0; i < padded; ++i) {
      const int64_t position = shape.num_keys - shape.num_queries + std::min(i, shape.num_queries - 1);
      int64_t lo = 0, hi = shape.num_keys;
      if (causal) hi = position + 1;
      if (window > 0) {
        lo = std::max(lo, position - window + 1);
        hi = std::min(hi, position + window);
      }
      if (doc_ids.has_value()) {
        lo = std::max(lo, begin[position]);
        hi = std::min(hi, end[position]);
      }
      ranges.lo[row * padded + i] = static_cast<float>(lo);
      ranges.hi[row * padded + i] = static_cast<float>(hi);
    }
  }
  return ranges;
}

void copy_strides(const Tensor& t, int64_t (&stride)[3]) {
  for (int64_t i = 0; i < 3; ++i) stride[i] = t.stride(i);
}

// A function of the shape alone, so that threads do not change any sum.
int64_t parts_of(const Shape& shape) {
  const int64_t pairs = shape.batch * shape.kv_heads, group = shape.heads / shape.kv_heads;
  return std::min(group, std::max<int64_t>(1, (kMinTasks + pairs - 1) / pairs));
}

template <class S>
void fill_args(
    ForwardArgs<S>& args, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& alibi_slopes,
    const Shape& shape, const Ranges& ranges, double scale, double soft_cap) {
  args.q = in<S>(q);
  args.k = in<S>(k);
  args.v = in<S>(v);
  args.lo = ranges.lo.data();
  args.hi = ranges.hi.data();
  args.slopes = alibi_slopes.has_value() ? in<float>(*alibi_slopes) : nullptr;
  args.range_stride = ranges.stride;
  copy_strides(q, args.q_stride);
  copy_strides(k, args.k_stride);
  copy_strides(v, args.v_stride);
  args.num_queries = shape.num_queries;
  args.num_keys = shape.num_keys;
  args.heads = shape.heads;
  args.kv_heads = shape.kv_heads;
  args.head_dim = shape.head_dim;
  args.parts = parts_of(shape);
  args.scale = static_cast<float>(scale);
  args.soft_cap = static_cast<float>(soft_cap);
}

bool is_empty(const Shape& shape) { return shape.batch * shape.num_queries * shape.num_keys * shape.heads == 0; }

std::tuple<Tensor, Tensor> attention_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& doc_ids, const std::optional<Tensor>& query_doc_ids,
    const std::optional<Tensor>& alibi_slopes, bool causal, int64_t window, double scale, double soft_cap, bool fp32_out) {
  const Shape shape = attention::check_input(q, k, v, doc_ids, query_doc_ids, alibi_slopes, causal, window, soft_cap);
  const auto type = fp32_out ? ScalarType::Float : q.scalar_type();
  Tensor result = torch::stable::new_empty(q, {shape.batch, shape.num_queries, shape.heads, shape.head_dim}, type);
  Tensor lse = torch::stable::new_empty(q, {shape.batch, shape.heads, shape.num_queries}, ScalarType::Float);
  with_type(q, [&](auto s) {
    using S = decltype(s);
    if (is_empty(shape)) {
      // No query, or queries without any key.
      fill_zeros(result);
      std::fill_n(out<float>(lse), lse.numel(), -__builtin_inff());
      return;
    }
    const Ranges ranges = find_ranges(shape, doc_ids, query_doc_ids, causal, window);
    ForwardArgs<S> args{};
    fill_args(args, q, k, v, alibi_slopes, shape, ranges, scale, soft_cap);
    if (fp32_out) {
      args.out_fp32 = out<float>(result);
    } else {
      args.out = out<S>(result);
    }
    args.lse = out<float>(lse);
    const int64_t keys = round_up(shape.num_keys, kBlockKeys), dims = round_up(shape.head_dim, 16);
    if (shape.num_queries <= kFewQueries) {
      const int64_t grain = std::max<int64_t>(1, kGrain / (shape.num_keys * shape.head_dim));
      torch::stable::parallel_for(0, shape.batch * shape.num_queries * shape.heads, grain, [&](int64_t begin, int64_t end) {
        const Scratch scratch = new_scratch(keys);
        DL_PER_DOT(forward_few<S>(args, begin, end, scratch.get()))
      });
      return;
    }
    const int64_t heads = shape.heads / (shape.kv_heads * args.parts) + 1;
    const int64_t grain = std::max<int64_t>(1, kGrain / (shape.num_queries * shape.num_keys * shape.head_dim * heads));
    torch::stable::parallel_for(0, shape.batch * shape.kv_heads * args.parts, grain, [&](int64_t begin, int64_t end) {
      const Scratch scratch = new_scratch(
          2 * keys * dims + (kBlockKeys + 4 * kBlockQueries) * dims + 2 * kBlockKeys * kBlockQueries + 8 * kBlockQueries);
      DL_PER_DOT(forward<S>(args, begin, end, scratch.get()))
    });
  });
  return {result, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& result,
    const Tensor& lse, const std::optional<Tensor>& doc_ids, const std::optional<Tensor>& query_doc_ids,
    const std::optional<Tensor>& alibi_slopes, bool causal, int64_t window, double scale, double soft_cap, bool fp32_out) {
  const Shape shape = attention::check_input(q, k, v, doc_ids, query_doc_ids, alibi_slopes, causal, window, soft_cap);
  check_same_shape(result, q, "out", "q");
  check_same_shape(dout, q, "dout", "q");
  attention::check_rows(result, q, "out");
  attention::check_rows(dout, q, "dout");
  attention::check_stat(lse, q, shape, "lse");
  if (dlse.has_value()) attention::check_stat(*dlse, q, shape, "dlse");
  const auto type = fp32_out ? ScalarType::Float : q.scalar_type();
  Tensor dq = torch::stable::new_empty(q, {shape.batch, shape.num_queries, shape.heads, shape.head_dim}, type);
  Tensor dk = torch::stable::new_empty(k, {shape.batch, shape.num_keys, shape.kv_heads, shape.head_dim}, type);
  Tensor dv = torch::stable::new_empty(v, {shape.batch, shape.num_keys, shape.kv_heads, shape.head_dim}, type);
  with_type(q, [&](auto s) {
    using S = decltype(s);
    if (is_empty(shape)) {
      for (Tensor* grad : {&dq, &dk, &dv}) fill_zeros(*grad);
      return;
    }
    const Ranges ranges = find_ranges(shape, doc_ids, query_doc_ids, causal, window);
    BackwardArgs<S> args{};
    fill_args<S>(args, q, k, v, alibi_slopes, shape, ranges, scale, soft_cap);
    args.dout = in<S>(dout);
    args.dlse = dlse.has_value() ? in<float>(*dlse) : nullptr;
    args.out = in<S>(result);
    args.lse = in<float>(lse);
    if (fp32_out) {
      args.dq_fp32 = out<float>(dq);
      args.dk_fp32 = out<float>(dk);
      args.dv_fp32 = out<float>(dv);
    } else {
      args.dq = out<S>(dq);
      args.dk = out<S>(dk);
      args.dv = out<S>(dv);
    }
    copy_strides(result, args.out_stride);
    copy_strides(dout, args.dout_stride);
    const int64_t tasks = shape.batch * shape.kv_heads * args.parts;
    const int64_t partial = args.parts > 1 ? tasks * shape.num_keys * shape.head_dim : 0;
    Tensor partials = torch::stable::new_empty(q, {2, partial}, ScalarType::Float);
    args.dk_parts = out<float>(partials);
    args.dv_parts = args.dk_parts + partial;
    const int64_t keys = round_up(shape.num_keys, kBlockKeys), queries = round_up(shape.num_queries, kBlockQueries);
    const int64_t dims = round_up(shape.head_dim, 16), heads = shape.heads / (shape.kv_heads * args.parts) + 1;
    const int64_t grain = std::max<int64_t>(1, kGrain / (shape.num_queries * shape.num_keys * shape.head_dim * heads));
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      const Scratch scratch = new_scratch(
          (5 * keys + kBlockKeys + 5 * queries + kBlockQueries) * dims + 2 * queries + (kBlockKeys + 4 * 8) * kBlockQueries);
      DL_PER_DOT(backward<S>(args, begin, end, scratch.get()))
    });
    if (args.parts > 1) {
      const int64_t token_grain = std::max<int64_t>(1, kGrain / (args.parts * shape.kv_heads * shape.head_dim));
      torch::stable::parallel_for(0, shape.batch * shape.num_keys, token_grain, [&](int64_t begin, int64_t end) {
        DL_PER_ISA(add_parts<S>(args, begin, end));
      });
    }
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("attention", TORCH_BOX(&dist_llm::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&dist_llm::attention_backward_cpu));
}
