// Attention of bf16 and fp16 on tensor cores (FlashAttention-2: Dao, arXiv:2307.08691): forward, and backward in two passes without atomics.
//
// D is 64, 128 or 256, the next one from the head dim up; products stop at the head dim's own multiple of 16. Probabilities, and the
// gradients of scores, are rounded to the storage type for their products; everything else is fp32.
#pragma once

#include "attention/attention_cuda_tiles.cuh"

namespace dist_llm::attention_cuda {

constexpr int kQueries = 64;  // rows of the blocks that own queries
constexpr int kKeys = 64;     // rows of the blocks that own keys

// Rows of the tiles that pass by, in forward and in backward: what registers and shared memory leave room for.
template <int D>
constexpr int kPassing = D <= 128 ? 64 : 32;
template <int D>
constexpr int kPassingBackward = D <= 64 ? 64 : 32;
// Columns of dk and dv that a block sums: with more, both do not fit into registers.
template <int D>
constexpr int kOwnColumns = D <= 128 ? D : 128;

template <int D>
constexpr int kForwardBytes = 2 * kStride<D> * (kQueries + 2 * kPassing<D>);
template <int D>
constexpr int kBackwardBytes = 2 * kStride<D> * (2 * 64 + 4 * kPassingBackward<D>);

// What a block of queries knows of itself.
template <class S>
struct Queries {
  int first, last, low, high;  // queries of the tile; rows g and g + 8 of this thread
  int2 range_low, range_high;
  int begin, end;              // keys that any query of the tile sees
  int whole_begin, whole_end;  // keys that all of them see
  __device__ Queries(const ForwardArgs<S>& args, const Place& place) {
    const int2* ranges = args.ranges + place.row * args.range_stride;
    const int warp = static_cast<int>(threadIdx.x / 32), g = static_cast<int>(threadIdx.x % 32 / 4);
    first = place.tile * kQueries;
    last = min(first + kQueries, args.num_queries) - 1;
    low = first + warp * 16 + g;
    high = low + 8;
    range_low = low <= last ? ranges[low] : make_int2(0, 0);
    range_high = high <= last ? ranges[high] : make_int2(0, 0);
    begin = ranges[first].x;
    end = ranges[last].y;
    whole_begin = ranges[last].x;
    whole_end = ranges[first].y;
  }
};

template <int D, class S>
__global__ void __launch_bounds__(kThreads) forward_kernel(const ForwardArgs<S> args) {
  constexpr int kTile = kPassing<D>, kTiles = kTile / 8, kOut = D / 8;
  DL_DYNAMIC_SHARED(S, shared);
  S* const q_tile = shared;
  S* const k_tile = q_tile + kQueries * kStride<D>;
  S* const v_tile = k_tile + kTile * kStride<D>;
  Place place((args.num_queries + kQueries - 1) / kQueries, args.heads);
  // In causal order the last queries have the most to do: they start first.
  place.tile = (args.num_queries + kQueries - 1) / kQueries - 1 - place.tile;
  const Queries<S> mine(args, place);
  const Rule rule(args, place.head);
  const int kv_head = place.head / (args.heads / args.kv_heads);
  const S* q = args.q + place.row * args.q_stride[0] + place.head * args.q_stride[2];
  const S* k = args.k + place.row * args.k_stride[0] + kv_head * args.k_stride[2];
  const S* v = args.v + place.row * args.v_stride[0] + kv_head * args.v_stride[2];
  const int warp = static_cast<int>(threadIdx.x / 32), t = static_cast<int>(threadIdx.x % 4);

  float acc[kOut][4] = {};
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.f, 0.f};
  const int first_tile = mine.begin / kTile, end_tile = mine.end > mine.begin ? (mine.end + kTile - 1) / kTile : first_tile;
  load_tile<D, kQueries>(q_tile, q, args.q_stride[1], mine.first, args.num_queries, args.head_dim, args.packs);
  if (first_tile < end_tile) load_tile<D, kTile>(k_tile, k, args.k_stride[1], first_tile * kTile, args.num_keys, args.head_dim, args.packs);
  commit_copies();
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int key0 = tile * kTile;
    wait_for_copies<0>();
    __syncthreads();  // the keys are there, and the last values are done with
    load_tile<D, kTile>(v_tile, v, args.v_stride[1], key0, args.num_keys, args.head_dim, args.packs);
    commit_copies();
    float scores[kTiles][4] = {};
    multiply_rows<D>(scores, q_tile + warp * 16 * kStride<D>, k_tile, args.head_dim);
    wait_for_copies<0>();
    __syncthreads();  // the values are there, and these keys are done with
    if (tile + 1 < end_tile) load_tile<D, kTile>(k_tile, k, args.k_stride[1], key0 + kTile, args.num_keys, args.head_dim, args.packs);
    commit_copies();

    const bool all_see_all = key0 >= mine.whole_begin && key0 + kTile <= mine.whole_end;
    float tile_max[2] = {row_max[0], row_max[1]};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = key0 + n * 8 + 2 * t + i % 2;
        const int2 range = i < 2 ? mine.range_low : mine.range_high;
        const bool is_seen = all_see_all || (key >= range.x && key < range.y);
        scores[n][i] = is_seen ? rule.of(scores[n][i], i < 2 ? mine.low : mine.high, key).value : -INFINITY;
        tile_max[i / 2] = fmaxf(tile_max[i / 2], scores[n][i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      tile_max[i] = fmaxf(tile_max[i], __shfl_xor_sync(0xffffffffu, tile_max[i], 1));
      tile_max[i] = fmaxf(tile_max[i], __shfl_xor_sync(0xffffffffu, tile_max[i], 2));
      // A row that has seen no key yet is shifted by nothing: -inf minus itself would be NaN.
      const float shift = tile_max[i] == -INFINITY ? 0.f : tile_max[i];
      const float shrink = exp2f((row_max[i] - shift) * kLog2E);
      row_max[i] = tile_max[i];
      tile_max[i] = shift;
      row_sum[i] *= shrink;
#pragma unroll
      for (int n = 0; n < kOut; ++n) {
        acc[n][2 * i] *= shrink;
        acc[n][2 * i + 1] *= shrink;
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = exp2f((scores[n][i] - tile_max[i / 2]) * kLog2E);
        row_sum[i / 2] += scores[n][i];
      }
    }
    uint32_t probabilities[kTiles / 2][4];
    round_to_left<S>(scores, probabilities);
    multiply_columns<D>(acc, probabilities, v_tile, args.head_dim);
  }
  wait_for_copies<0>();
  __syncthreads();  // without a tile of keys the queries' own is only there now

  float factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    row_sum[i] += __shfl_xor_sync(0xffffffffu, row_sum[i], 1);
    row_sum[i] += __shfl_xor_sync(0xffffffffu, row_sum[i], 2);
    factor[i] = row_sum[i] == 0.f ? 0.f : 1.f / row_sum[i];
    float lse = row_sum[i] == 0.f ? -INFINITY : row_max[i] + logf(row_sum[i]);
    if (args.is_broken[args.range_stride == 0 ? 0 : place.row] != 0) factor[i] = lse = NAN;
    const int query = i == 0 ? mine.low : mine.high;
    if (t == 0 && query <= mine.last) args.lse[(static_cast<int64_t>(place.row) * args.heads + place.head) * args.num_queries + query] = lse;
  }
  const int row0 = mine.first + warp * 16;
  const int64_t token_stride = static_cast<int64_t>(args.heads) * args.head_dim;
  const int64_t start =
      (static_cast<int64_t>(place.row) * args.num_queries + row0) * token_stride + static_cast<int64_t>(place.head) * args.head_dim;
  store_rows<D>(
      acc, factor[0], factor[1], q_tile + warp * 16 * kStride<D>, args.out + start, args.out_fp32 == nullptr ? nullptr : args.out_fp32 + start,
      token_stride, args.num_queries - row0, args.head_dim, args.head_dim % 8 == 0);
}

// dq of a tile of queries: keys and values pass by, the next ones on their way while these are used.
template <int D, class S>
__global__ void __launch_bounds__(kThreads) backward_q_kernel(const BackwardArgs<S> args) {
  constexpr int kTile = kPassingBackward<D>, kTiles = kTile / 8, kOut = D / 8;
  DL_DYNAMIC_SHARED(S, shared);
  S* const q_tile = shared;
  S* const dout_tile = q_tile + kQueries * kStride<D>;
  S* const passing = dout_tile + kQueries * kStride<D>;  // keys and values, twice
  Place place((args.num_queries + kQueries - 1) / kQueries, args.heads);
  place.tile = (args.num_queries + kQueries - 1) / kQueries - 1 - place.tile;
  const Queries<S> mine(args, place);
  const Rule rule(args, place.head);
  const int kv_head = place.head / (args.heads / args.kv_heads);
  const S* q = args.q + place.row * args.q_stride[0] + place.head * args.q_stride[2];
  const S* dout = args.dout + place.row * args.dout_stride[0] + place.head * args.dout_stride[2];
  const S* k = args.k + place.row * args.k_stride[0] + kv_head * args.k_stride[2];
  const S* v = args.v + place.row * args.v_stride[0] + kv_head * args.v_stride[2];
  const int warp = static_cast<int>(threadIdx.x / 32), t = static_cast<int>(threadIdx.x % 4);
  const int64_t stats = (static_cast<int64_t>(place.row) * args.heads + place.head) * args.num_queries;
  float lse[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = i == 0 ? mine.low : mine.high;
    lse[i] = query <= mine.last ? args.stats_lse[stats + query] : 0.f;
    delta[i] = query <= mine.last ? args.delta[stats + query] : 0.f;
  }

  float acc[kOut][4] = {};
  const int first_tile = mine.begin / kTile, end_tile = mine.end > mine.begin ? (mine.end + kTile - 1) / kTile : first_tile;
  const auto load_passing = [&](int tile) {
    S* const k_tile = passing + (tile - first_tile) % 2 * (2 * kTile * kStride<D>);
    load_tile<D, kTile>(k_tile, k, args.k_stride[1], tile * kTile, args.num_keys, args.head_dim, args.packs);
    load_tile<D, kTile>(k_tile + kTile * kStride<D>, v, args.v_stride[1], tile * kTile, args.num_keys, args.head_dim, args.packs);
  };
  load_tile<D, kQueries>(q_tile, q, args.q_stride[1], mine.first, args.num_queries, args.head_dim, args.packs);
  load_tile<D, kQueries>(dout_tile, dout, args.dout_stride[1], mine.first, args.num_queries, args.head_dim, args.packs);
  if (first_tile < end_tile) load_passing(first_tile);
  commit_copies();
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int key0 = tile * kTile;
    wait_for_copies<0>();
    __syncthreads();  // this tile is there, and the one before it is done with
    if (tile + 1 < end_tile) load_passing(tile + 1);
    commit_copies();
    const S* k_tile = passing + (tile - first_tile) % 2 * (2 * kTile * kStride<D>);
    float scores[kTiles][4] = {}, grads[kTiles][4] = {};
    multiply_rows<D>(scores, q_tile + warp * 16 * kStride<D>, k_tile, args.head_dim);
    multiply_rows<D>(grads, dout_tile + warp * 16 * kStride<D>, k_tile + kTile * kStride<D>, args.head_dim);
    const bool all_see_all = key0 >= mine.whole_begin && key0 + kTile <= mine.whole_end;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = key0 + n * 8 + 2 * t + i % 2;
        const int2 range = i < 2 ? mine.range_low : mine.range_high;
        const bool is_seen = all_see_all || (key >= range.x && key < range.y);
        const Score score = rule.of(scores[n][i], i < 2 ? mine.low : mine.high, key);
        const float p = exp2f((score.value - lse[i / 2]) * kLog2E);
        grads[n][i] = is_seen ? p * (grads[n][i] - delta[i / 2]) * score.slope : 0.f;
      }
    }
    uint32_t left[kTiles / 2][4];
    round_to_left<S>(grads, left);
    multiply_columns<D>(acc, left, k_tile, args.head_dim);
  }
  wait_for_copies<0>();
  __syncthreads();  // without a tile of keys the queries' own are only there now

  const int row0 = mine.first + warp * 16;
  const int64_t token_stride = static_cast<int64_t>(args.heads) * args.head_dim;
  const int64_t start =
      (static_cast<int64_t>(place.row) * args.num_queries + row0) * token_stride + static_cast<int64_t>(place.head) * args.head_dim;
  store_rows<D>(
      acc, args.scale, args.scale, q_tile + warp * 16 * kStride<D>, args.dq + start, args.dq_fp32 == nullptr ? nullptr : args.dq_fp32 + start,
      token_stride, args.num_queries - row0, args.head_dim, args.head_dim % 8 == 0);
}

// Of a query that passes by, as the blocks of keys need it.
struct QueryStats {
  float lse, delta;
  int begin, end;
};

// dk and dv of a tile of keys (of some of their columns): the queries of all heads that read these keys pass by. Scores are transposed here,
// keys by queries, so that they are the left side of both products.
template <int D, class S>
__global__ void __launch_bounds__(kThreads) backward_kv_kernel(const BackwardArgs<S> args) {
  constexpr int kTile = kPassingBackward<D>, kTiles = kTile / 8, kOut = kOwnColumns<D> / 8;
  DL_DYNAMIC_SHARED(S, shared);
  __shared__ QueryStats all_stats[2][kTile];
  S* const k_tile = shared;
  S* const v_tile = k_tile + kKeys * kStride<D>;
  S* const passing = v_tile + kKeys * kStride<D>;  // queries and gradients of results, twice
  const Place place((args.num_keys + kKeys - 1) / kKeys, args.kv_heads);
  const int column0 = static_cast<int>(blockIdx.y) * kOwnColumns<D>, columns = min(args.head_dim - column0, kOwnColumns<D>);
  const int group = args.heads / args.kv_heads;
  const int2* ranges = args.ranges + place.row * args.range_stride;
  const int key0 = place.tile * kKeys, key_end = min(key0 + kKeys, args.num_keys);
  const int warp = static_cast<int>(threadIdx.x / 32), g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
  const int key_low = key0 + warp * 16 + g, key_high = key_low + 8;
  const S* k = args.k + place.row * args.k_stride[0] + place.head * args.k_stride[2];
  const S* v = args.v + place.row * args.v_stride[0] + place.head * args.v_stride[2];

  const int first_tile = first_query_of(ranges, args.num_queries, key0) / kTile;
  const int end_tile = (end_of_queries_of(ranges, args.num_queries, key_end) + kTile - 1) / kTile;
  const int tiles = max(end_tile - first_tile, 0);
  float dk[kOut][4] = {}, dv[kOut][4] = {};
  // Step i: tile i % tiles of query head i / tiles of the group.
  const auto load_passing = [&](int step) {
    const int head = place.head * group + step / tiles, query0 = (first_tile + step % tiles) * kTile;
    S* const q_tile = passing + step % 2 * (2 * kTile * kStride<D>);
    load_tile<D, kTile>(
        q_tile, args.q + place.row * args.q_stride[0] + head * args.q_stride[2], args.q_stride[1], query0, args.num_queries, args.head_dim,
        args.packs);
    load_tile<D, kTile>(
        q_tile + kTile * kStride<D>, args.dout + place.row * args.dout_stride[0] + head * args.dout_stride[2], args.dout_stride[1], query0,
        args.num_queries, args.head_dim, args.packs);
    if (static_cast<int>(threadIdx.x) < kTile) {
      const int query = query0 + static_cast<int>(threadIdx.x);
      QueryStats stats{0.f, 0.f, 0, 0};
      if (query < args.num_queries) {
        const int64_t index = (static_cast<int64_t>(place.row) * args.heads + head) * args.num_queries + query;
        stats = {args.stats_lse[index], args.delta[index], ranges[query].x, ranges[query].y};
      }
      all_stats[step % 2][threadIdx.x] = stats;
    }
  };
  load_tile<D, kKeys>(k_tile, k, args.k_stride[1], key0, args.num_keys, args.head_dim, args.packs);
  load_tile<D, kKeys>(v_tile, v, args.v_stride[1], key0, args.num_keys, args.head_dim, args.packs);
  if (tiles > 0) load_passing(0);
  commit_copies();
  for (int step = 0; step < tiles * group; ++step) {
    wait_for_copies<0>();
    __syncthreads();  // this tile is there, and the one before it is done with
    if (step + 1 < tiles * group) load_passing(step + 1);
    commit_copies();
    const int query0 = (first_tile + step % tiles) * kTile;
    const Rule rule(args, place.head * group + step / tiles);
    const S* q_tile = passing + step % 2 * (2 * kTile * kStride<D>);
    const S* dout_tile = q_tile + kTile * kStride<D>;
    float scores[kTiles][4] = {}, grads[kTiles][4] = {};
    multiply_rows<D>(scores, k_tile + warp * 16 * kStride<D>, q_tile, args.head_dim);
    multiply_rows<D>(grads, v_tile + warp * 16 * kStride<D>, dout_tile, args.head_dim);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + 2 * t + i % 2, key = i < 2 ? key_low : key_high;
        const QueryStats stats = all_stats[step % 2][column];
        const bool is_seen = key >= stats.begin && key < stats.end;
        const Score score = rule.of(scores[n][i], query0 + column, key);
        const float p = is_seen ? exp2f((score.value - stats.lse) * kLog2E) : 0.f;
        scores[n][i] = p;
        grads[n][i] = is_seen ? p * (grads[n][i] - stats.delta) * score.slope : 0.f;
      }
    }
    uint32_t left[kTiles / 2][4];
    round_to_left<S>(scores, left);
    multiply_columns<D>(dv, left, dout_tile + column0, columns);
    round_to_left<S>(grads, left);
    multiply_columns<D>(dk, left, q_tile + column0, columns);
  }
  wait_for_copies<0>();
  __syncthreads();  // without a step the tiles of keys and values are only there now

  const int row0 = key0 + warp * 16;
  const int64_t token_stride = static_cast<int64_t>(args.kv_heads) * args.head_dim;
  const int64_t start = (static_cast<int64_t>(place.row) * args.num_keys + row0) * token_stride +
                        static_cast<int64_t>(place.head) * args.head_dim + column0;
  const bool packs = args.head_dim % 8 == 0;
  store_rows<D>(
      dk, args.scale, args.scale, k_tile + warp * 16 * kStride<D>, args.dk + start, args.dk_fp32 == nullptr ? nullptr : args.dk_fp32 + start,
      token_stride, args.num_keys - row0, columns, packs);
  store_rows<D>(
      dv, 1.f, 1.f, v_tile + warp * 16 * kStride<D>, args.dv + start, args.dv_fp32 == nullptr ? nullptr : args.dv_fp32 + start, token_stride,
      args.num_keys - row0, columns, packs);
}

}  // namespace dist_llm::attention_cuda
