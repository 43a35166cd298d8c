// Whether a result is written past the caches.
#pragma once

#include <cstdint>

namespace dist_llm::moe {

// Twice as large as a core's own cache, so that little of it would still be there when it is read.
constexpr int64_t kStreamedBytes = int64_t{4} << 20;

// Rows of `width` numbers, each of which must begin at a cache line.
template <class S>
bool is_streamed(const S* rows, int64_t num_rows, int64_t width) {
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(S));
  return num_rows * row_bytes >= kStreamedBytes && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(rows) % 64 == 0;
}

}  // namespace dist_llm::moe
