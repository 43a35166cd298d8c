// Gradients of a linear layer's weight and bias. The definition is dist_llm/kernels/linear/reference.py; the schema is in native.py beside it.
//
//   linear_weight_grad(dy, x) -> (dweight, dbias)       dweight = dy^T x, dbias[n] = sum over r of dy[r, n]
//
// Shapes   dy: (R, N); x: (R, K); dweight: (N, K); dbias: (N,). Any of them may be 0.
// Dtypes   bf16. Products and sums are in fp32 and rounded once; like every bf16 instruction of the processor, products take subnormal
//          numbers as zero.
// Memory   dy and x contiguous, on one device; every element of both results is written.
// Where    processors with AVX-512 and its BF16 products (cpu_multiplies_bf16); elsewhere a matrix product of torch's is as good.
// Numbers  rows are added in the order of r: the same bits twice and at any number of threads.
#pragma once

#include "common/checks.h"

namespace dist_llm::linear {

struct Shape {
  int64_t rows;
  int64_t outputs;
  int64_t inputs;
};

inline Shape check_weight_grad(const Tensor& dy, const Tensor& x) {
  STD_TORCH_CHECK(
      dy.dim() == 2 && x.dim() == 2 && dy.size(0) == x.size(0), "dy ", shape_of(dy), " and x ", shape_of(x),
      " must be matrices with the same number of rows");
  check_contiguous(dy, "dy");
  check_contiguous(x, "x");
  check_same_device(dy, x, "dy", "x");
  check_same_dtype(dy, x, "dy", "x");
  return {x.size(0), dy.size(1), x.size(1)};
}

}  // namespace dist_llm::linear
