// Which tokens belong to each row of a table: a sort of the tokens by row, in time that does not depend on the number of rows.
#pragma once

#include <cstdint>
#include <vector>

namespace dist_llm::embedding {

// The rows that have a token, in rising order, and the tokens of each, in rising order.
struct TokensByRow {
  std::vector<int64_t> rows;
  std::vector<int64_t> first;   // the tokens of rows[n] are tokens[first[n]] ... tokens[first[n + 1] - 1]
  std::vector<int64_t> tokens;
};

// 0 <= ids[t] < num_rows < 2^31 and count < 2^31, which the caller has checked.
inline TokensByRow tokens_by_row(const int64_t* ids, int64_t count, int64_t num_rows) {
  // A row and its token in one number, sorted by the digits of the row, lowest first: each counting sort keeps the order of the last.
  constexpr int kDigitBits = 11;
  constexpr uint64_t kDigits = uint64_t{1} << kDigitBits;
  const size_t n = static_cast<size_t>(count);
  std::vector<uint64_t> keys(n), sorted(n);
  for (size_t t = 0; t < n; ++t) keys[t] = static_cast<uint64_t>(ids[t]) << 32 | t;
  for (int shift = 32; shift < 64 && (static_cast<uint64_t>(num_rows > 0 ? num_rows - 1 : 0) << 32) >> shift != 0; shift += kDigitBits) {
    uint32_t at[kDigits] = {};
    for (const uint64_t key : keys) ++at[(key >> shift) % kDigits];
    uint32_t sum = 0;
    for (uint32_t& a : at) {
      const uint32_t here = a;
      a = sum;
      sum += here;
    }
    for (const uint64_t key : keys) sorted[at[(key >> shift) % kDigits]++] = key;
    keys.swap(sorted);
  }
  TokensByRow found;
  found.tokens.resize(n);
  for (size_t i = 0; i < n; ++i) {
    const int64_t row = static_cast<int64_t>(keys[i] >> 32);
    if (i == 0 || row != found.rows.back()) {
      found.rows.push_back(row);
      found.first.push_back(static_cast<int64_t>(i));
    }
    found.tokens[i] = static_cast<int64_t>(keys[i] & 0xffffffffu);
  }
  found.first.push_back(count);
  return found;
}

}  // namespace dist_llm::embedding
