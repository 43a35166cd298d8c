// Attention of fp32, in fp32 throughout: plain multiply-adds, as tensor cores would round the factors.
//
// A block owns 32 rows (queries, or keys for dk and dv) and lets tiles of 32 pass by. Four threads share a row: they compute every fourth of
// its scores and exchange them through shared memory, and each sums every fourth pack of four columns of the result.
#pragma once

#include "attention/attention_cuda_args.cuh"

namespace dist_llm::attention_cuda {

constexpr int kRows32 = 32;
constexpr int kScoresStride = kRows32 + 1;

// The four floats between rows keep the rows that a warp reads at once in different banks.
template <int D>
constexpr int kStride32 = D + 4;
template <int D>
constexpr int kForwardBytes32 = 4 * (3 * kRows32 * kStride32<D> + kRows32 * kScoresStride);
template <int D>
constexpr int kBackwardBytes32 = 4 * (4 * kRows32 * kStride32<D> + 2 * kRows32 * kScoresStride);

template <int D>
__device__ inline void load_tile32(float* shared, const float* head, int64_t token_stride, int first, int count, int head_dim, bool packs) {
  constexpr int kChunks = D / 4;
  for (int i = static_cast<int>(threadIdx.x); i < kRows32 * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * 4, token = first + row;
    float values[4] = {};
    if (packs) {
      if (token < count && column < head_dim) load_floats<4>(head + token * token_stride + column, values);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (token < count && column + j < head_dim) values[j] = head[token * token_stride + column + j];
      }
    }
    store_floats<4>(shared + row * kStride32<D> + column, values);
  }
}

// out[i] += the product of row `left` with row 4 i + t of `right`.
template <int D>
__device__ inline void multiply_rows32(float (&out)[8], const float* left, const float* right, int t, int head_dim) {
  for (int d = 0; d < head_dim; d += 4) {
    float a[4];
    load_floats<4>(left + d, a);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float b[4];
      load_floats<4>(right + (4 * i + t) * kStride32<D> + d, b);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i] += a[j] * b[j];
    }
  }
}

// acc += the sum over rows of weights[row] * right[row], packs 4 i + t of the columns. Eight rows are added up before they join the sum: over
// many tiles that keeps its rounding errors small.
template <int D>
__device__ inline void add_rows32(float (&acc)[D / 16][4], const float* weights, const float* right, int t, int head_dim) {
  constexpr int kTogether = 8;
  for (int row = 0; row < kRows32; row += kTogether) {
    float weight[kTogether];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) weight[r] = weights[row + r];
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const int column = (4 * i + t) * 4;
      if (column >= head_dim) break;
      float sum[4] = {};
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        float b[4];
        load_floats<4>(right + (row + r) * kStride32<D> + column, b);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += weight[r] * b[j];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] += sum[j];
    }
  }
}

template <int D>
__device__ inline void store_row32(const float (&acc)[D / 16][4], float factor, float* to, int t, int head_dim) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    float values[4];
    const int column = (4 * i + t) * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = acc[i][j] * factor;
    if (head_dim % 4 == 0) {
      if (column < head_dim) store_floats<4>(to + column, values);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (column + j < head_dim) to[column + j] = values[j];
      }
    }
  }
}

// A thread's row of queries, and the keys that the block's queries see.
struct Row32 {
  int query, row, t;
  bool exists;
  int2 range;
  int first_tile, end_tile;
  template <class S>
  __device__ Row32(const ForwardArgs<S>& args, const Place& place)
      : row(static_cast<int>(threadIdx.x / 4)), t(static_cast<int>(threadIdx.x % 4)) {
    const int2* ranges = args.ranges + place.row * args.range_stride;
    const int first = place.tile * kRows32, last = min(first + kRows32, args.num_queries) - 1;
    query = first + row;
    exists = query <= last;
    range = exists ? ranges[query] : make_int2(0, 0);
    const int begin = ranges[first].x, end = ranges[last].y;
    first_tile = begin / kRows32;
    end_tile = end > begin ? (end + kRows32 - 1) / kRows32 : first_tile;
  }
};

template <int D>
__global__ void __launch_bounds__(kThreads) forward_fp32_kernel(const ForwardArgs<float> args) {
  DL_DYNAMIC_SHARED(float, shared);
  float* const q_tile = shared;
  float* const k_tile = q_tile + kRows32 * kStride32<D>;
  float* const v_tile = k_tile + kRows32 * kStride32<D>;
  float* const all_scores = v_tile + kRows32 * kStride32<D>;
  const Place place((args.num_queries + kRows32 - 1) / kRows32, args.heads);
  const Row32 mine(args, place);
  const Rule rule(args, place.head);
  const int kv_head = place.head / (args.heads / args.kv_heads);
  const float* k = args.k + place.row * args.k_stride[0] + kv_head * args.k_stride[2];
  const float* v = args.v + place.row * args.v_stride[0] + kv_head * args.v_stride[2];
  load_tile32<D>(
      q_tile, args.q + place.row * args.q_stride[0] + place.head * args.q_stride[2], args.q_stride[1], place.tile * kRows32, args.num_queries,
      args.head_dim, args.packs);
  float* const row_scores = all_scores + mine.row * kScoresStride;

  float acc[D / 16][4] = {};
  float row_max = -INFINITY, row_sum = 0.f;
  for (int tile = mine.first_tile; tile < mine.end_tile; ++tile) {
    __syncthreads();  // the last keys and values are done with
    load_tile32<D>(k_tile, k, args.k_stride[1], tile * kRows32, args.num_keys, args.head_dim, args.packs);
    load_tile32<D>(v_tile, v, args.v_stride[1], tile * kRows32, args.num_keys, args.head_dim, args.packs);
    __syncthreads();
    float scores[8] = {};
    multiply_rows32<D>(scores, q_tile + mine.row * kStride32<D>, k_tile, mine.t, args.head_dim);
    float tile_max = row_max;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int key = tile * kRows32 + 4 * i + mine.t;
      scores[i] = key >= mine.range.x && key < mine.range.y ? rule.of(scores[i], mine.query, key).value : -INFINITY;
      tile_max = fmaxf(tile_max, scores[i]);
    }
    tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 1));
    tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 2));
    // A row that has seen no key yet is shifted by nothing: -inf minus itself would be NaN.
    const float shift = tile_max == -INFINITY ? 0.f : tile_max;
    const float shrink = expf(row_max - shift);
    row_max = tile_max;
    row_sum *= shrink;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] *= shrink;
    }
    __syncwarp();  // the last probabilities of the row are done with
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float p = expf(scores[i] - shift);
      row_sum += p;
      row_scores[4 * i + mine.t] = p;
    }
    __syncwarp();
    add_rows32<D>(acc, row_scores, v_tile, mine.t, args.head_dim);
  }
  row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 1);
  row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 2);
  float factor = row_sum == 0.f ? 0.f : 1.f / row_sum;
  float lse = row_sum == 0.f ? -INFINITY : row_max + logf(row_sum);
  if (args.is_broken[args.range_stride == 0 ? 0 : place.row] != 0) factor = lse = NAN;
  if (!mine.exists) return;
  if (mine.t == 0) args.lse[(static_cast<int64_t>(place.row) * args.heads + place.head) * args.num_queries + mine.query] = lse;
  const int64_t token = static_cast<int64_t>(place.row) * args.num_queries + mine.query;
  store_row32<D>(acc, factor, args.out_fp32 + (token * args.heads + place.head) * args.head_dim, mine.t, args.head_dim);
}

template <int D>
__global__ void __launch_bounds__(kThreads) backward_q_fp32_kernel(const BackwardArgs<float> args) {
  DL_DYNAMIC_SHARED(float, shared);
  float* const q_tile = shared;
  float* const dout_tile = q_tile + kRows32 * kStride32<D>;
  float* const k_tile = dout_tile + kRows32 * kStride32<D>;
  float* const v_tile = k_tile + kRows32 * kStride32<D>;
  const Place place((args.num_queries + kRows32 - 1) / kRows32, args.heads);
  const Row32 mine(args, place);
  const Rule rule(args, place.head);
  const int kv_head = place.head / (args.heads / args.kv_heads);
  const float* k = args.k + place.row * args.k_stride[0] + kv_head * args.k_stride[2];
  const float* v = args.v + place.row * args.v_stride[0] + kv_head * args.v_stride[2];
  load_tile32<D>(
      q_tile, args.q + place.row * args.q_stride[0] + place.head * args.q_stride[2], args.q_stride[1], place.tile * kRows32, args.num_queries,
      args.head_dim, args.packs);
  load_tile32<D>(
      dout_tile, args.dout + place.row * args.dout_stride[0] + place.head * args.dout_stride[2], args.dout_stride[1], place.tile * kRows32,
      args.num_queries, args.head_dim, args.packs);
  float* const row_grads = v_tile + kRows32 * kStride32<D> + mine.row * kScoresStride;
  const int64_t stats = (static_cast<int64_t>(place.row) * args.heads + place.head) * args.num_queries + mine.query;
  const float lse = mine.exists ? args.stats_lse[stats] : 0.f, delta = mine.exists ? args.delta[stats] : 0.f;

  float acc[D / 16][4] = {};
  for (int tile = mine.first_tile; tile < mine.end_tile; ++tile) {
    __syncthreads();  // the last keys and values are done with
    load_tile32<D>(k_tile, k, args.k_stride[1], tile * kRows32, args.num_keys, args.head_dim, args.packs);
    load_tile32<D>(v_tile, v, args.v_stride[1], tile * kRows32, args.num_keys, args.head_dim, args.packs);
    __syncthreads();
    float scores[8] = {}, grads[8] = {};
    multiply_rows32<D>(scores, q_tile + mine.row * kStride32<D>, k_tile, mine.t, args.head_dim);
    multiply_rows32<D>(grads, dout_tile + mine.row * kStride32<D>, v_tile, mine.t, args.head_dim);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int key = tile * kRows32 + 4 * i + mine.t;
      const bool is_seen = key >= mine.range.x && key < mine.range.y;
      const Score score = rule.of(scores[i], mine.query, key);
      row_grads[4 * i + mine.t] = is_seen ? expf(score.value - lse) * (grads[i] - delta) * score.slope : 0.f;
    }
    __syncwarp();
    add_rows32<D>(acc, row_grads, k_tile, mine.t, args.head_dim);
  }
  if (!mine.exists) return;
  const int64_t token = static_cast<int64_t>(place.row) * args.num_queries + mine.query;
  store_row32<D>(acc, args.scale, args.dq_fp32 + (token * args.heads + place.head) * args.head_dim, mine.t, args.head_dim);
}

template <int D>
__global__ void __launch_bounds__(kThreads) backward_kv_fp32_kernel(const BackwardArgs<float> args) {
  DL_DYNAMIC_SHARED(float, shared);
  float* const k_tile = shared;
  float* const v_tile = k_tile + kRows32 * kStride32<D>;
  float* const q_tile = v_tile + kRows32 * kStride32<D>;
  float* const dout_tile = q_tile + kRows32 * kStride32<D>;
  float* const all_scores = dout_tile + kRows32 * kStride32<D>;
  const Place place((args.num_keys + kRows32 - 1) / kRows32, args.kv_heads);
  const int group = args.heads / args.kv_heads, row = static_cast<int>(threadIdx.x / 4), t = static_cast<int>(threadIdx.x % 4);
  const int2* ranges = args.ranges + place.row * args.range_stride;
  const int key0 = place.tile * kRows32, key_end = min(key0 + kRows32, args.num_keys), key = key0 + row;
  load_tile32<D>(
      k_tile, args.k + place.row * args.k_stride[0] + place.head * args.k_stride[2], args.k_stride[1], key0, args.num_keys, args.head_dim,
      args.packs);
  load_tile32<D>(
      v_tile, args.v + place.row * args.v_stride[0] + place.head * args.v_stride[2], args.v_stride[1], key0, args.num_keys, args.head_dim,
      args.packs);
  float* const row_scores = all_scores + row * kScoresStride;
  float* const row_grads = row_scores + kRows32 * kScoresStride;
  const int first_tile = first_query_of(ranges, args.num_queries, key0) / kRows32;
  const int end_tile = (end_of_queries_of(ranges, args.num_queries, key_end) + kRows32 - 1) / kRows32;

  float dk[D / 16][4] = {}, dv[D / 16][4] = {};
  for (int head = place.head * group; head < (place.head + 1) * group; ++head) {
    const Rule rule(args, head);
    const int64_t stats = (static_cast<int64_t>(place.row) * args.heads + head) * args.num_queries;
    for (int tile = first_tile; tile < end_tile; ++tile) {
      __syncthreads();  // the last queries are done with
      load_tile32<D>(
          q_tile, args.q + place.row * args.q_stride[0] + head * args.q_stride[2], args.q_stride[1], tile * kRows32, args.num_queries,
          args.head_dim, args.packs);
      load_tile32<D>(
          dout_tile, args.dout + place.row * args.dout_stride[0] + head * args.dout_stride[2], args.dout_stride[1], tile * kRows32,
          args.num_queries, args.head_dim, args.packs);
      __syncthreads();
      float scores[8] = {}, grads[8] = {};
      multiply_rows32<D>(scores, k_tile + row * kStride32<D>, q_tile, t, args.head_dim);
      multiply_rows32<D>(grads, v_tile + row * kStride32<D>, dout_tile, t, args.head_dim);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int query = tile * kRows32 + 4 * i + t;
        float p = 0.f, grad = 0.f;
        if (query < args.num_queries && key >= ranges[query].x && key < ranges[query].y) {
          const Score score = rule.of(scores[i], query, key);
          p = expf(score.value - args.stats_lse[stats + query]);
          grad = p * (grads[i] - args.delta[stats + query]) * score.slope;
        }
        row_scores[4 * i + t] = p;
        row_grads[4 * i + t] = grad;
      }
      __syncwarp();
      add_rows32<D>(dv, row_scores, dout_tile, t, args.head_dim);
      add_rows32<D>(dk, row_grads, q_tile, t, args.head_dim);
    }
  }
  if (key >= key_end) return;
  const int64_t start = ((static_cast<int64_t>(place.row) * args.num_keys + key) * args.kv_heads + place.head) * args.head_dim;
  store_row32<D>(dk, args.scale, args.dk_fp32 + start, t, args.head_dim);
  store_row32<D>(dv, 1.f, args.dv_fp32 + start, t, args.head_dim);
}

}  // namespace dist_llm::attention_cuda
