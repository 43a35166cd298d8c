// Rows sorted by expert and brought back, on CPU; the contract is in moe.h, the row kernels in moe_permute_rows.inc.
//
// The sort is a counting sort in parts of the tokens: each part counts its slots by expert, one pass over the counts tells where each
// part's rows of each expert begin, and then each part writes its own. The order of the rows is that of a stable sort at any
// number of parts, and the cost is that of copying the rows, whatever the number of experts.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "common/softmax_vec.h"
#include "common/tensors.h"
#include "moe/moe.h"
#include "moe/stream.h"

namespace dist_llm {

template <class S>
struct PermuteArgs {
  const S* x;
  const int32_t* experts;
  S* rows;
  int32_t* source;
  int64_t top_k;
  int64_t width;
  int64_t num_experts;
};

template <class S>
struct CombineArgs {
  const S* rows;
  const int32_t* row_of_slot;  // -1: none
  const float* weights;        // null: ones
  S* out;
  int64_t top_k;
  int64_t width;
};

template <class S>
struct SpreadArgs {
  const S* dout;
  const S* rows;
  const int32_t* row_of_slot;  // -1: none
  const float* weights;
  S* drows;
  float* dweights;
  int64_t top_k;
  int64_t width;
};

}  // namespace dist_llm

#define DL_ISA_SOURCE "moe/moe_permute_rows.inc"
#include "common/foreach_isa.h"

namespace dist_llm {
namespace {

using moe::PermuteShape;

// Elements a thread should have before another one is worth waking.
constexpr int64_t kGrain = 16384;
// Slots whose counts are kept apart; more parts than this only cost.
constexpr int64_t kSlotsPerPart = 1024;
constexpr int64_t kMaxParts = 64;

int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)); }

// Counts in bin[e] the slots of expert e, in the last bin those of none. Returns the first expert number that is none, or -1.
int32_t count_slots(const int32_t* experts, int64_t begin, int64_t end, int32_t num_experts, int32_t* bin) {
  std::fill_n(bin, num_experts + 1, 0);
  for (int64_t slot = begin; slot < end; ++slot) {
    const int32_t expert = experts[slot];
    if (expert < -1 || expert >= num_experts) return expert;
    ++bin[expert < 0 ? num_experts : expert];
  }
  return -1;
}

// Turns the counts of each part into the first row of each part's slots of each expert; writes counts and offsets.
void place_parts(std::vector<int32_t>& bins, int64_t parts, int64_t num_experts, int32_t* counts, int32_t* offsets) {
  int32_t row = 0;
  for (int64_t expert = 0; expert <= num_experts; ++expert) {
    const int32_t first = row;
    offsets[expert] = first;  // of the slots of none: the number of rows that have an expert
    for (int64_t part = 0; part < parts; ++part) {
      int32_t& bin = bins[part * (num_experts + 1) + expert];
      const int32_t here = bin;
      bin = row;
      row += here;
    }
    if (expert < num_experts) counts[expert] = row - first;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_permute_cpu(const Tensor& x, const Tensor& experts, int64_t num_experts) {
  const PermuteShape shape = moe::check_permute(x, experts, num_experts);
  Tensor rows = torch::stable::new_empty(x, {shape.slots(), shape.width});
  Tensor source = torch::stable::new_empty(experts, {shape.slots()});
  Tensor counts = torch::stable::new_empty(experts, {num_experts});
  Tensor offsets = torch::stable::new_empty(experts, {num_experts + 1});

  const int64_t tokens_per_part = std::max(
      std::max<int64_t>(1, kSlotsPerPart / shape.top_k), (shape.tokens + kMaxParts - 1) / kMaxParts);
  const int64_t parts = (shape.tokens + tokens_per_part - 1) / tokens_per_part;
  const int64_t num_bins = num_experts + 1;
  std::vector<int32_t> bins(static_cast<size_t>(parts * num_bins));
  std::vector<int32_t> wrong(static_cast<size_t>(parts));
  const int32_t* expert_of = in<int32_t>(experts);
  const int64_t parts_grain = grain_of(tokens_per_part * shape.top_k);
  torch::stable::parallel_for(0, parts, parts_grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * tokens_per_part, last = std::min(first + tokens_per_part, shape.tokens);
      wrong[part] = count_slots(
          expert_of, first * shape.top_k, last * shape.top_k, static_cast<int32_t>(num_experts), bins.data() + part * num_bins);
    }
  });
  for (const int32_t expert : wrong) {
    STD_TORCH_CHECK(expert == -1, "expert ", expert, " must be from -1 to num_experts - 1 (", num_experts - 1, ")");
  }
  place_parts(bins, parts, num_experts, out<int32_t>(counts), out<int32_t>(offsets));

  with_type(x, "moe_permute", [&](auto s) {
    using S = decltype(s);
    const PermuteArgs<S> args{in<S>(x),    expert_of,    out<S>(rows), out<int32_t>(source),
                              shape.top_k, shape.width, num_experts};
    const bool stream = moe::is_streamed(args.rows, shape.slots(), shape.width);
    torch::stable::parallel_for(0, parts, grain_of(tokens_per_part * shape.top_k * shape.width), [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        int32_t* next = bins.data() + part * num_bins;
        const int64_t first = part * tokens_per_part, last = std::min(first + tokens_per_part, shape.tokens);
        if (stream) {
          DL_PER_ISA(permute<true>(args, next, first, last))
        } else {
          DL_PER_ISA(permute<false>(args, next, first, last))
        }
      }
    });
  });
  return {rows, source, counts, offsets};
}

// The inverse of source: the row of each slot, -1 where it has none.
std::vector<int32_t> rows_of_slots(const Tensor& source) {
  const int32_t* source_of = in<int32_t>(source);
  const int64_t slots = source.numel();
  std::vector<int32_t> row_of_slot(static_cast<size_t>(slots), -1);
  for (int64_t row = 0; row < slots; ++row) {
    const int32_t slot = source_of[row];
    STD_TORCH_CHECK(slot >= -1 && slot < slots, "source ", slot, " of row ", row, " must be from -1 to ", slots - 1);
    if (slot < 0) continue;
    STD_TORCH_CHECK(row_of_slot[slot] < 0, "source ", slot, " of row ", row, " is that of row ", row_of_slot[slot], " too");
    row_of_slot[slot] = static_cast<int32_t>(row);
  }
  return row_of_slot;
}

Tensor moe_unpermute_cpu(const Tensor& rows, const Tensor& source, const std::optional<Tensor>& weights, int64_t top_k) {
  const PermuteShape shape = moe::check_unpermute(rows, "rows", true, source, weights, top_k);
  const std::vector<int32_t> row_of_slot = rows_of_slots(source);
  Tensor result = torch::stable::new_empty(rows, {shape.tokens, shape.width});
  with_type(rows, "moe_unpermute", [&](auto s) {
    using S = decltype(s);
    const CombineArgs<S> args{
        in<S>(rows), row_of_slot.data(), weights.has_value() ? in<float>(*weights) : nullptr, out<S>(result), shape.top_k, shape.width};
    const bool stream = moe::is_streamed(args.out, shape.tokens, shape.width);
    torch::stable::parallel_for(0, shape.tokens, grain_of(shape.top_k * shape.width), [&](int64_t begin, int64_t end) {
      std::vector<const S*> row(static_cast<size_t>(shape.top_k));
      std::vector<float> weight(row.size());
      if (stream) {
        DL_PER_ISA(combine<true>(args, row.data(), weight.data(), begin, end))
      } else {
        DL_PER_ISA(combine<false>(args, row.data(), weight.data(), begin, end))
      }
    });
  });
  return result;
}

std::tuple<Tensor, Tensor> moe_unpermute_backward_cpu(
    const Tensor& dout, const std::optional<Tensor>& rows, const Tensor& source, const std::optional<Tensor>& weights, int64_t top_k) {
  const PermuteShape shape = moe::check_unpermute(dout, "dout", false, source, weights, top_k);
  moe::check_backward_rows(rows, weights, dout, shape);
  Tensor drows = torch::stable::new_empty(dout, {shape.slots(), shape.width});
  Tensor dweights = weights.has_value() ? torch::stable::new_empty(*weights, {shape.tokens, shape.top_k})
                                        : torch::stable::new_empty(dout, {0}, ScalarType::Float);
  const std::vector<int32_t> row_of_slot = rows_of_slots(source);
  const int32_t* source_of = in<int32_t>(source);
  with_type(dout, "moe_unpermute", [&](auto s) {
    using S = decltype(s);
    const SpreadArgs<S> args{
        in<S>(dout), rows.has_value() ? in<S>(*rows) : nullptr, row_of_slot.data(), weights.has_value() ? in<float>(*weights) : nullptr,
        out<S>(drows), weights.has_value() ? out<float>(dweights) : nullptr, shape.top_k, shape.width};
    const bool stream = moe::is_streamed(args.drows, shape.slots(), shape.width);
    torch::stable::parallel_for(0, shape.tokens, grain_of(shape.top_k * shape.width), [&](int64_t begin, int64_t end) {
      if (stream) {
        DL_PER_ISA(spread<true>(args, begin, end))
      } else {
        DL_PER_ISA(spread<false>(args, begin, end))
      }
    });
    for (int64_t row = 0; row < shape.slots(); ++row) {
      if (source_of[row] < 0) std::memset(args.drows + row * shape.width, 0, static_cast<size_t>(shape.width) * sizeof(S));
    }
  });
  return {drows, dweights};
}

void moe_zero_rest_cpu(Tensor& rows, const Tensor& counts) {
  const moe::RestShape shape = moe::check_zero_rest(rows, counts);
  const int32_t* count_of = in<int32_t>(counts);
  int64_t taken = 0;
  for (int64_t e = 0; e < counts.numel(); ++e) taken += count_of[e];
  STD_TORCH_CHECK(taken >= 0 && taken <= shape.rows, "counts add up to ", taken, "; rows ", shape_of(rows), " are ", shape.rows);
  with_type(rows, "moe_zero_rest_", [&](auto s) {
    using S = decltype(s);
    std::memset(out<S>(rows) + taken * shape.width, 0, static_cast<size_t>((shape.rows - taken) * shape.width) * sizeof(S));
  });
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("moe_permute", TORCH_BOX(&dist_llm::moe_permute_cpu));
  m.impl("moe_unpermute", TORCH_BOX(&dist_llm::moe_unpermute_cpu));
  m.impl("moe_unpermute_backward", TORCH_BOX(&dist_llm::moe_unpermute_backward_cpu));
  m.impl("moe_zero_rest_", TORCH_BOX(&dist_llm::moe_zero_rest_cpu));
}
