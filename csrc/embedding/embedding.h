// Rows of a table by number, and the gradient of the table. The definition is dist_llm/kernels/embedding/reference.py; the schemas are in
// native.py beside it.
//
//   embedding(ids, weight, dtype) -> rows                               rows[t] = weight[ids[t]], in dtype
//   embedding_backward(drows, ids, num_rows, dtype) -> dweight          dweight[r] = sum of drows[t] over ids[t] = r, in dtype
//   embedding_backward_into(drows, ids, dweight) -> ()                  the same added to dweight; rows without a token are not touched
//
// Shapes   ids: (...), T numbers; weight, dweight: (V, D), D >= 1; rows, drows: (..., D).
// Dtypes   ids int64; weight, dweight, rows, drows fp32 or bf16 (CUDA: fp16 too), in any combination. Sums are in fp32, the existing
//          gradient too, and rounded once.
// Memory   all arguments contiguous, on one device; every element of a result is written; only dweight of the last function is changed.
// Range    0 <= ids[t] < V. On CPU another number is an error that names it, before anything is written; on CUDA, where the host
//          does not wait, an assertion on the device.
// Numbers  the tokens of a row are added in the order of t: the same bits twice and at any number of threads.
#pragma once

#include "common/checks.h"

namespace dist_llm::embedding {

struct Shape {
  int64_t tokens;
  int64_t num_rows;
  int64_t dim;
};

inline void check_ids(const Tensor& ids, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(
      ids.scalar_type() == ScalarType::Long, "ids is ", torch::headeronly::toString(ids.scalar_type()), "; it must be int64");
  check_contiguous(ids, "ids");
  check_same_device(ids, like, "ids", like_name);
}

inline void check_table(const Tensor& table, const char* name) {
  STD_TORCH_CHECK(
      table.dim() == 2 && table.size(1) >= 1, name, " ", shape_of(table), " must be (rows, columns) with at least one column");
  check_contiguous(table, name);
}

inline Shape check_forward(const Tensor& ids, const Tensor& weight) {
  check_table(weight, "weight");
  check_ids(ids, weight, "weight");
  return {ids.numel(), weight.size(0), weight.size(1)};
}

inline Shape check_backward(const Tensor& drows, const Tensor& ids, int64_t num_rows) {
  check_ids(ids, drows, "the gradient of the rows");
  bool fits = drows.dim() == ids.dim() + 1 && drows.size(drows.dim() - 1) >= 1;
  for (int64_t i = 0; fits && i < ids.dim(); ++i) fits = drows.size(i) == ids.size(i);
  STD_TORCH_CHECK(
      fits, "the gradient of the rows ", shape_of(drows), " must have the shape of ids ", shape_of(ids),
      " and a last dimension of at least 1");
  check_contiguous(drows, "the gradient of the rows");
  STD_TORCH_CHECK(num_rows >= 0 && num_rows < (int64_t{1} << 31), "a table of ", num_rows, " rows; it must have fewer than 2^31");
  STD_TORCH_CHECK(ids.numel() < (int64_t{1} << 31), ids.numel(), " ids; there must be fewer than 2^31");
  return {ids.numel(), num_rows, drows.size(drows.dim() - 1)};
}

inline Shape check_backward_into(const Tensor& drows, const Tensor& ids, const Tensor& dweight) {
  check_table(dweight, "the gradient of the table");
  const Shape shape = check_backward(drows, ids, dweight.size(0));
  check_same_device(dweight, drows, "the gradient of the table", "the gradient of the rows");
  STD_TORCH_CHECK(
      dweight.size(1) == shape.dim, "the gradient of the table ", shape_of(dweight), " must have the columns of the gradient of the rows ",
      shape_of(drows));
  return shape;
}

}  // namespace dist_llm::embedding
