// What all CUDA kernels of attention share: their arguments, the keys each query sees, and the rule from products to scores.
#pragma once

#include "common/cuda_launch.h"

namespace dist_llm::attention_cuda {

constexpr int kThreads = 128;  // four warps: each has 16 rows of a tile
constexpr float kLog2E = 1.4426950408889634f;

template <class S>
struct ForwardArgs {
  const S* q;
  const S* k;
  const S* v;
  S* out;
  float* out_fp32;  // written instead of out when not null
  float* lse;
  const int2* ranges;  // of every query the keys it sees, from x to y - 1; neither ever falls along a row
  int64_t range_stride;  // from one row of the batch to the next
  const int* is_broken;  // of every row of ranges: its documents fall along the row, and its results are NaN
  const float* slopes;  // null: no ALiBi
  int64_t q_stride[3], k_stride[3], v_stride[3];  // of row of the batch, token, head
  int num_queries, num_keys, heads, kv_heads, head_dim;
  float scale, soft_cap;  // soft_cap 0: none
  bool packs;             // head dim, strides and addresses of q, k, v (and dout) allow 16 bytes at a time
};

template <class S>
struct BackwardArgs : ForwardArgs<S> {
  const S* dout;
  const float* stats_lse;
  const float* delta;  // sum of dout * out over a head, minus dlse
  S* dq;
  S* dk;
  S* dv;
  float* dq_fp32;  // written instead of dq, dk, dv when not null
  float* dk_fp32;
  float* dv_fp32;
  int64_t dout_stride[3];
};

// A block's place in a one-dimensional grid of (row of the batch, head, tile), tiles fastest.
struct Place {
  int tile, head, row;
  __device__ Place(int tiles, int heads)
      : tile(static_cast<int>(blockIdx.x % tiles)),
        head(static_cast<int>(blockIdx.x / tiles % heads)),
        row(static_cast<int>(blockIdx.x / tiles / heads)) {}
};

// Score of a product, and what its derivative is multiplied by.
struct Score {
  float value, slope;
};

struct Rule {
  float scale, soft_cap, alibi;
  int first;  // the place of query 0 among the keys
  bool has_alibi;

  template <class S>
  __device__ Rule(const ForwardArgs<S>& args, int head)
      : scale(args.scale),
        soft_cap(args.soft_cap),
        alibi(args.slopes == nullptr ? 0.f : args.slopes[head]),
        first(args.num_keys - args.num_queries),
        has_alibi(args.slopes != nullptr) {}

  __device__ Score of(float product, int query, int key) const {
    Score score{product * scale, 1.f};
    if (soft_cap > 0.f) {
      const float bent = tanhf(score.value / soft_cap);
      score.value = soft_cap * bent;
      score.slope = 1.f - bent * bent;
    }
    if (has_alibi) score.value -= alibi * fabsf(static_cast<float>(first + query - key));
    return score;
  }
};

// The first of `count` ids that is at least `id` (`past`: greater than it).
template <class I>
__device__ inline int find_id(const I* ids, int count, I id, bool past) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (ids[middle] < id || (past && ids[middle] == id)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One block a row of documents (one alone without any).
template <class I>
__global__ void ranges_kernel(
    const I* __restrict__ doc_ids, const I* __restrict__ query_doc_ids, int2* __restrict__ ranges, int* __restrict__ is_broken,
    int num_queries, int num_keys, bool causal, int64_t window) {
  const int row = static_cast<int>(blockIdx.x);
  const I* keys = doc_ids == nullptr ? nullptr : doc_ids + static_cast<int64_t>(row) * num_keys;
  const I* queries = query_doc_ids == nullptr ? nullptr : query_doc_ids + static_cast<int64_t>(row) * num_queries;
  int falls = 0;
  if (keys != nullptr) {
    for (int j = 1 + static_cast<int>(threadIdx.x); j < num_keys; j += static_cast<int>(blockDim.x)) falls |= keys[j] < keys[j - 1];
  }
  if (queries != nullptr) {
    for (int i = 1 + static_cast<int>(threadIdx.x); i < num_queries; i += static_cast<int>(blockDim.x)) falls |= queries[i] < queries[i - 1];
  }
  falls = __syncthreads_or(falls);
  if (threadIdx.x == 0) is_broken[row] = falls;
  for (int i = static_cast<int>(threadIdx.x); i < num_queries; i += static_cast<int>(blockDim.x)) {
    int64_t low = 0, high = num_keys;
    const int64_t position = static_cast<int64_t>(num_keys) - num_queries + i;
    if (queries == nullptr) {
      if (causal) high = position + 1;
      if (window > 0) {
        low = max(low, position - window + 1);
        if (window < num_keys) high = min(high, position + window);
      }
    }
    if (keys != nullptr) {
      const I id = queries == nullptr ? keys[position] : queries[i];
      low = max(low, static_cast<int64_t>(find_id(keys, num_keys, id, false)));
      high = min(high, static_cast<int64_t>(find_id(keys, num_keys, id, true)));
    }
    ranges[static_cast<int64_t>(row) * num_queries + i] = make_int2(static_cast<int>(low), static_cast<int>(high));
  }
}

// The first query of a row that sees a key from `key` on, or sees none before it: those before it see only keys before `key`.
__device__ inline int first_query_of(const int2* ranges, int num_queries, int key) {
  int low = 0, high = num_queries;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (ranges[middle].y <= key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The first query of a row from which on none sees a key before `key`.
__device__ inline int end_of_queries_of(const int2* ranges, int num_queries, int key) {
  int low = 0, high = num_queries;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (ranges[middle].x < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// delta[row, head, query] = sum of dout * out over the head dim, minus dlse: one warp each.
template <class S>
__global__ void delta_kernel(
    const S* __restrict__ dout, const S* __restrict__ out, const float* __restrict__ dlse, float* __restrict__ delta, int64_t count,
    int num_queries, int heads, int head_dim, const int64_t dout_row, const int64_t dout_token, const int64_t dout_head,
    const int64_t out_row, const int64_t out_token, const int64_t out_head, bool packs) {
  constexpr int kPack = 16 / sizeof(S);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (index >= count) return;
  const int64_t query = index % num_queries, head = index / num_queries % heads, row = index / num_queries / heads;
  const S* a = dout + row * dout_row + query * dout_token + head * dout_head;
  const S* b = out + row * out_row + query * out_token + head * out_head;
  const int lane = static_cast<int>(threadIdx.x % 32);
  float sum = 0.f;
  if (packs) {
    for (int i = lane * kPack; i < head_dim; i += 32 * kPack) {
      float x[kPack], y[kPack];
      load_floats<kPack>(a + i, x);
      load_floats<kPack>(b + i, y);
#pragma unroll
      for (int j = 0; j < kPack; ++j) sum += x[j] * y[j];
    }
  } else {
    for (int i = lane; i < head_dim; i += 32) sum += to_float(a[i]) * to_float(b[i]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane == 0) delta[index] = sum - (dlse == nullptr ? 0.f : dlse[index]);
}

}  // namespace dist_llm::attention_cuda
