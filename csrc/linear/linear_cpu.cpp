// The gradient of a linear layer's weight on CPU; the contract is in linear.h, the products in weight_grad_tiles.h.
#include "linear/linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "common/tensors.h"
#include "linear/weight_grad_tiles.h"

namespace dist_llm {
namespace {

using linear::Shape;

#if defined(__x86_64__)
using namespace linear;

constexpr int64_t kBlockOutputs = 2048;  // whose unfinished sums, 3 MiB with kBlockInputs, wait for the next rows
constexpr int64_t kGrain = int64_t{1} << 21;  // products a thread should have before another one is worth waking

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One block of dweight, [outputs, inputs], at one block of rows.
struct Block {
  const bf16* dy;  // its first row and column
  const bf16* x;
  Shape shape;  // of the block
  int64_t dy_stride, x_stride;
  bool first, last;  // of the blocks of rows
  uint32_t* x_words;
  float* sums;       // [strip][tile][panel][kTileSums]
  float* bias_sums;  // of its outputs, or null where another block has added them
  bf16* dweight;
};

void multiply_strips(const Block& b, int64_t begin, int64_t end) {
  alignas(64) uint32_t words[kStripOutputs * kBlockRows / 2];
  const int64_t pairs = divide_up(b.shape.rows, 2), panels = divide_up(b.shape.inputs, kTileInputs);
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t output = strip * kStripOutputs, columns = std::min(kStripOutputs, b.shape.outputs - output);
    float* bias_sums = b.bias_sums == nullptr ? nullptr : b.bias_sums + output;
    pack_outputs(b.dy + output, b.dy_stride, b.shape.rows, columns, pairs, words, bias_sums);
    for (int64_t tile = 0; tile * kTileOutputs < columns; ++tile) {
      const int64_t o = output + tile * kTileOutputs;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t i = panel * kTileInputs;
        float* sums = b.sums + ((strip * kStripTiles + tile) * panels + panel) * kTileSums;
        multiply_tile(
            words + tile * pairs * kTileOutputs, b.x_words + panel * pairs * kTileInputs, pairs, b.first, b.last, sums,
            b.dweight + o * b.x_stride + i, b.x_stride, std::min(kTileOutputs, b.shape.outputs - o),
            std::min(kTileInputs, b.shape.inputs - i));
      }
    }
  }
}

void multiply_block(const Block& b) {
  const int64_t pairs = divide_up(b.shape.rows, 2);
  torch::stable::parallel_for(0, pairs, 128, [&](int64_t begin, int64_t end) {
    pack_inputs(b.x, b.x_stride, b.shape.rows, b.shape.inputs, begin, end, pairs, b.x_words);
  });
  const int64_t strip_products = std::max<int64_t>(1, kStripOutputs * b.shape.inputs * b.shape.rows);
  const int64_t grain = std::max<int64_t>(1, kGrain / strip_products);
  torch::stable::parallel_for(0, divide_up(b.shape.outputs, kStripOutputs), grain, [&](int64_t begin, int64_t end) {
    multiply_strips(b, begin, end);
  });
}

void weight_grad(const bf16* dy, const bf16* x, const Shape& shape, const Tensor& like, bf16* dweight, bf16* dbias) {
  const int64_t rows = std::min(shape.rows, kBlockRows), outputs = std::min(shape.outputs, kBlockOutputs);
  const int64_t inputs = divide_up(std::min(shape.inputs, kBlockInputs), kTileInputs) * kTileInputs;
  Tensor x_words = torch::stable::new_empty(like, {divide_up(rows, 2) * inputs}, ScalarType::Float);
  // Of rows that fit in one block no sum waits.
  const int64_t waiting = shape.rows > kBlockRows ? divide_up(outputs, kStripOutputs) * kStripOutputs * inputs : 0;
  Tensor sums = torch::stable::new_empty(like, {waiting}, ScalarType::Float);
  std::vector<float> bias_sums(shape.outputs, 0.f);
  for (int64_t o = 0; o < shape.outputs; o += kBlockOutputs) {
    // Once even without rows or inputs: a result is written all the same.
    for (int64_t i = 0; i < std::max<int64_t>(1, shape.inputs); i += kBlockInputs) {
      for (int64_t r = 0; r < std::max<int64_t>(1, shape.rows); r += kBlockRows) {
        multiply_block(
            {dy + r * shape.outputs + o,
             x + r * shape.inputs + i,
             {std::min(kBlockRows, shape.rows - r), std::min(kBlockOutputs, shape.outputs - o), std::min(kBlockInputs, shape.inputs - i)},
             shape.outputs,
             shape.inputs,
             r == 0,
             r + kBlockRows >= shape.rows,
             static_cast<uint32_t*>(x_words.mutable_data_ptr()),
             out<float>(sums),
             i == 0 ? bias_sums.data() + o : nullptr,
             dweight + o * shape.inputs + i});
      }
    }
  }
  round_sums(bias_sums.data(), shape.outputs, dbias);
}
#endif

std::tuple<Tensor, Tensor> linear_weight_grad_cpu(const Tensor& dy, const Tensor& x) {
  const Shape shape = linear::check_weight_grad(dy, x);
  STD_TORCH_CHECK(
      dy.scalar_type() == ScalarType::BFloat16, "linear_weight_grad on CPU takes bf16, not ",
      torch::headeronly::toString(dy.scalar_type()));
  STD_TORCH_CHECK(
      multiplies_bf16(), "linear_weight_grad needs AVX-512 with BF16 products; this process uses ", isa_name(isa()),
      ": take kernels.linear = onednn or reference");
  Tensor dweight = torch::stable::new_empty(dy, {shape.outputs, shape.inputs});
  Tensor dbias = torch::stable::new_empty(dy, {shape.outputs});
#if defined(__x86_64__)
  weight_grad(in<bf16>(dy), in<bf16>(x), shape, dy, out<bf16>(dweight), out<bf16>(dbias));
#endif
  return {dweight, dbias};
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("linear_weight_grad", TORCH_BOX(&dist_llm::linear_weight_grad_cpu));
}
