// Tiles of 16-bit numbers in shared memory and the two products that attention makes of them, warp by warp.
//
// A tile has its tokens as rows of D + 8 numbers: the 16 bytes between rows put the eight rows that ldmatrix reads at once into different
// banks. What is past the head dim (to a multiple of 16) and past the last token is zero.
#pragma once

#include "attention/attention_cuda_args.cuh"
#include "common/mma.h"

namespace dist_llm::attention_cuda {

template <int D>
constexpr int kStride = D + 8;

// Rows first ... first + kRows - 1 of a head. With packs the copy is under way until it is waited for.
template <int D, int kRows, class S>
__device__ inline void load_tile(S* shared, const S* head, int64_t token_stride, int first, int count, int head_dim, bool packs) {
  constexpr int kChunks = D / 8;
  const int dims = (head_dim + 15) / 16 * 16;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8, token = first + row;
    if (column >= dims) continue;
    S* to = shared + row * kStride<D> + column;
    if (packs) {
      const bool is_there = token < count && column < head_dim;
      copy_async(to, is_there ? head + token * token_stride + column : head, is_there);
    } else {
      Pack<S, 8> pack;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (token < count && column + j < head_dim) {
          pack.at[j] = head[token * token_stride + column + j];
        } else {
          from_float(0.f, &pack.at[j]);
        }
      }
      *reinterpret_cast<Pack<S, 8>*>(to) = pack;
    }
  }
}

// acc += left right^T: 16 rows of the warp's tile by 8 * kTiles rows of another, over the head dim.
template <int D, int kTiles, class S>
__device__ inline void multiply_rows(float (&acc)[kTiles][4], const S* left, const S* right, int head_dim) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    if (k >= head_dim) break;
    uint32_t a[4];
    load_matrices<false>(a, left + lane % 16 * kStride<D> + k + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      load_matrices<false>(b, right + (n * 8 + lane % 8 + lane / 16 * 8) * kStride<D> + k + lane / 8 % 2 * 8);
      mma<S>(acc[n], a, {b[0], b[1]});
      mma<S>(acc[n + 1], a, {b[2], b[3]});
    }
  }
}

// acc += left right: `left` 16 x 16 kSteps in fragments, `right` the first rows of a tile, 8 * kTiles columns of it.
template <int D, int kSteps, int kTiles, class S>
__device__ inline void multiply_columns(float (&acc)[kTiles][4], const uint32_t (&left)[kSteps][4], const S* right, int columns) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    if (n * 8 >= columns) break;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t b[4];
      load_matrices<true>(b, right + (k * 16 + lane % 16) * kStride<D> + n * 8 + lane / 16 * 8);
      mma<S>(acc[n], left[k], {b[0], b[1]});
      mma<S>(acc[n + 1], left[k], {b[2], b[3]});
    }
  }
}

// Results of a product, rounded, as the left side of the next.
template <class S, int kTiles>
__device__ inline void round_to_left(const float (&acc)[kTiles][4], uint32_t (&left)[kTiles / 2][4]) {
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) {
    left[k][0] = pack_pair(acc[2 * k][0], acc[2 * k][1], S{});
    left[k][1] = pack_pair(acc[2 * k][2], acc[2 * k][3], S{});
    left[k][2] = pack_pair(acc[2 * k + 1][0], acc[2 * k + 1][1], S{});
    left[k][3] = pack_pair(acc[2 * k + 1][2], acc[2 * k + 1][3], S{});
  }
}

// The warp's 16 rows of a result, rows g and g + 8 multiplied by `low` and `high`, to tokens of a head. `columns` of them are stored. The
// rows of the warp's own tile serve to bring 16 neighbouring bytes together; nobody else reads them.
template <int D, int kTiles, class S>
__device__ inline void store_rows(
    const float (&acc)[kTiles][4], float low, float high, S* staging, S* to, float* to_fp32, int64_t token_stride, int tokens, int columns,
    bool packs) {
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  if (to_fp32 != nullptr) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = n * 8 + 2 * t + i % 2;
        if (row < tokens && column < columns) to_fp32[row * token_stride + column] = acc[n][i] * (i < 2 ? low : high);
      }
    }
    return;
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n * 8 >= columns) break;
    *reinterpret_cast<uint32_t*>(staging + g * kStride<D> + n * 8 + 2 * t) = pack_pair(acc[n][0] * low, acc[n][1] * low, S{});
    *reinterpret_cast<uint32_t*>(staging + (g + 8) * kStride<D> + n * 8 + 2 * t) = pack_pair(acc[n][2] * high, acc[n][3] * high, S{});
  }
  __syncwarp();
  constexpr int kChunks = kTiles;
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = i / kChunks, column = i % kChunks * 8;
    if (row >= tokens || column >= columns) continue;
    const S* from = staging + row * kStride<D> + column;
    S* target = to + row * token_stride + column;
    if (packs) {
      *reinterpret_cast<Pack<S, 8>*>(target) = *reinterpret_cast<const Pack<S, 8>*>(from);
    } else {
      for (int j = 0; j < 8 && column + j < columns; ++j) target[j] = from[j];
    }
  }
}

}  // namespace dist_llm::attention_cuda
