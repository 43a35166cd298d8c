// Around the kernels of pair_columns.inc: sizes, and how the columns of a matrix are divided among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace dist_llm {

// Numbers that belong to `dim` columns are kept in arrays of so many: a multiple of every pair_width.
constexpr int64_t kColumnPad = 32;
inline int64_t padded(int64_t dim) { return (dim + kColumnPad - 1) / kColumnPad * kColumnPad; }

// Whether so many numbers of S are still in the first-level cache when they are read again: at most half of one of 48 KiB.
template <class S>
bool stays_in_cache(int64_t count) {
  return count * static_cast<int64_t>(sizeof(S)) <= 24 * 1024;
}

// Results from this size on are stored past the caches: they are larger than a second-level cache, and with them in the third the
// arguments of backward would not stay there. A result of 8 MiB is neither slower nor faster for its next reader, one of 2 MiB is slower.
constexpr int64_t kStreamBytes = 4 << 20;

template <class S>
bool is_worth_streaming(const S* result, int64_t rows, int64_t dim) {
  constexpr int64_t align = 64;  // the largest stream_align
  const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(S));
  return rows * row_bytes >= kStreamBytes && row_bytes % align == 0 && reinterpret_cast<uintptr_t>(result) % align == 0;
}

// Calls f(begin, end) for ranges of columns, begin a multiple of kColumnPad, for work that adds `parts` numbers a column.
template <class F>
void for_column_ranges(int64_t dim, int64_t parts, const F& f) {
  constexpr int64_t kGrain = 16384;
  const int64_t blocks = padded(dim) / kColumnPad;
  const int64_t grain = std::max<int64_t>(2, kGrain / (kColumnPad * std::max<int64_t>(1, parts)));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    f(begin * kColumnPad, std::min(dim, end * kColumnPad));
  });
}

}  // namespace dist_llm
