// Rows of a table by number on CPU, forward and backward; the contract is in embedding.h, the row kernels in embedding_rows.inc.
#include "embedding/embedding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/columns.h"
#include "common/isa.h"
#include "common/pair_vec.h"
#include "common/tensors.h"
#include "embedding/tokens_by_row.h"

namespace dist_llm::embedding {

// Columns whose sum is kept in the first-level cache while the tokens of a row are added.
constexpr int64_t kColumns = 1024;

template <class W, class S>
struct GatherArgs {
  const int64_t* ids;
  const W* weight;
  S* rows;
  int64_t dim;
};

template <class S, class W>
struct ScatterArgs {
  const S* drows;
  const int64_t* rows;    // these three are TokensByRow
  const int64_t* first;
  const int64_t* tokens;
  int64_t num_used;
  W* dweight;
  int64_t dim;
  bool adds;  // to what is in dweight
};

}  // namespace dist_llm::embedding

#define DL_ISA_SOURCE "embedding/embedding_rows.inc"
#include "common/foreach_isa.h"

namespace dist_llm {
namespace {

using embedding::GatherArgs;
using embedding::ScatterArgs;
using embedding::Shape;
using embedding::TokensByRow;

// Numbers a thread should have before another one is worth waking.
constexpr int64_t kGrain = 65536;

void check_range(const int64_t* ids, int64_t count, int64_t num_rows) {
  for (int64_t t = 0; t < count; ++t) {
    STD_TORCH_CHECK(
        ids[t] >= 0 && ids[t] < num_rows, "ids holds ", ids[t], " (number ", t, " of ", count, "), but the table has rows 0 to ",
        num_rows - 1);
  }
}

Tensor embedding_cpu(const Tensor& ids, const Tensor& weight, ScalarType dtype) {
  const Shape shape = embedding::check_forward(ids, weight);
  std::vector<int64_t> size(ids.sizes().begin(), ids.sizes().end());
  size.push_back(shape.dim);
  Tensor rows = torch::stable::new_empty(weight, {size.data(), size.size()}, dtype);
  check_range(in<int64_t>(ids), shape.tokens, shape.num_rows);
  with_type(weight, "embedding", [&](auto w) {
    with_type(rows, "embedding", [&](auto s) {
      using W = decltype(w);
      using S = decltype(s);
      const GatherArgs<W, S> args{in<int64_t>(ids), in<W>(weight), out<S>(rows), shape.dim};
      const int64_t grain = std::max<int64_t>(1, kGrain / shape.dim);
      torch::stable::parallel_for(
          0, shape.tokens, grain, [&](int64_t begin, int64_t end) { DL_PER_ISA(gather<W, S>(args, begin, end)) });
    });
  });
  return rows;
}

// f(args) with the arguments of the kernels, in the storage types of drows and dweight.
template <class F>
void with_scatter_args(const Tensor& drows, const TokensByRow& by_row, Tensor& dweight, int64_t dim, bool adds, const F& f) {
  with_type(drows, "embedding_backward", [&](auto s) {
    with_type(dweight, "embedding_backward", [&](auto w) {
      using S = decltype(s);
      using W = decltype(w);
      f(ScatterArgs<S, W>{
          in<S>(drows), by_row.rows.data(), by_row.first.data(), by_row.tokens.data(), static_cast<int64_t>(by_row.rows.size()),
          out<W>(dweight), dim, adds});
    });
  });
}

Tensor embedding_backward_cpu(const Tensor& drows, const Tensor& ids, int64_t num_rows, ScalarType dtype) {
  const Shape shape = embedding::check_backward(drows, ids, num_rows);
  check_range(in<int64_t>(ids), shape.tokens, num_rows);
  Tensor dweight = torch::stable::new_empty(drows, {num_rows, shape.dim}, dtype);
  const TokensByRow by_row = embedding::tokens_by_row(in<int64_t>(ids), shape.tokens, num_rows);
  with_scatter_args(drows, by_row, dweight, shape.dim, false, [&]<class S, class W>(const ScatterArgs<S, W>& args) {
    const bool stream = num_rows * shape.dim * static_cast<int64_t>(sizeof(W)) >= kStreamBytes;
    const int64_t grain = std::max<int64_t>(1, kGrain / shape.dim);
    torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
      const int64_t used = std::lower_bound(by_row.rows.begin(), by_row.rows.end(), begin) - by_row.rows.begin();
      DL_PER_ISA(scatter_and_clear<S, W>(args, used, begin, end, stream))
    });
  });
  return dweight;
}

void embedding_backward_into_cpu(const Tensor& drows, const Tensor& ids, Tensor dweight) {
  const Shape shape = embedding::check_backward_into(drows, ids, dweight);
  check_range(in<int64_t>(ids), shape.tokens, shape.num_rows);
  const TokensByRow by_row = embedding::tokens_by_row(in<int64_t>(ids), shape.tokens, shape.num_rows);
  with_scatter_args(drows, by_row, dweight, shape.dim, true, [&]<class S, class W>(const ScatterArgs<S, W>& args) {
    const int64_t grain = std::max<int64_t>(1, kGrain / shape.dim);
    torch::stable::parallel_for(
        0, args.num_used, grain, [&](int64_t begin, int64_t end) { DL_PER_ISA(scatter<S, W>(args, begin, end)) });
  });
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("embedding", TORCH_BOX(&dist_llm::embedding_cpu));
  m.impl("embedding_backward", TORCH_BOX(&dist_llm::embedding_backward_cpu));
  m.impl("embedding_backward_into", TORCH_BOX(&dist_llm::embedding_backward_into_cpu));
}
